"""The change of library size that groups under both conditions show."""

from types import SimpleNamespace

import numpy as np
import pytest

from discover_sc._observed_changes import library_change


def change(log_libraries, n_cells, treated=(False, True)):
    """Of groups a, b, ...: log libraries and cells, ``(n_groups, 2)``, before and after."""
    n_groups = len(n_cells)
    side = np.tile(treated, n_groups)
    reference = {
        "profile_codes": side[:, None].astype(int),
        "profile_doses": None,
        "profile_groups": np.repeat([chr(ord("a") + k) for k in range(n_groups)], 2),
        "profile_n_cells": np.ravel(n_cells),
        "profiles": np.zeros((2 * n_groups, 3)),
        "profile_inverse_library": np.zeros(2 * n_groups),
        "profile_log_library": np.ravel(log_libraries),
    }
    target = SimpleNamespace(
        is_source=lambda codes, doses, *_: codes[:, 0] == 0,
        is_met=lambda codes, doses: codes[:, 0] == 1,
    )
    return library_change(SimpleNamespace(reference_=reference), target, np.array([0]), None)


def test_one_group_tells_its_own_change():
    assert change([[6.0, 6.7]], [[80, 40]]) == pytest.approx(0.7)


def test_groups_count_by_the_cells_of_the_side_that_has_fewer():
    found = change([[6.0, 7.0], [6.0, 6.0]], [[30_000, 10_000], [10_000, 30_000]])
    assert found == pytest.approx(0.5, rel=0.001)
    found = change([[6.0, 7.0], [6.0, 6.0]], [[10**6, 10**6], [10**6, 100]])
    assert found == pytest.approx(1.0, rel=0.001)


def test_without_a_group_on_both_sides_nothing_changes():
    assert change([[6.0, 7.0]], [[100, 100]], treated=(False, False)) == 0.0
