import numpy as np
import pytest

from discover_sc._borrowed_effects import BorrowedEffects, KnownChanges

N_GENES = 400


def world(rng, noise=0.05):
    """6 known treatments made of 3 pathways, 4 groups that answer more or less strongly."""
    pathways = rng.normal(size=(3, N_GENES)) * (rng.random((3, N_GENES)) < 0.2)
    effects = rng.normal(size=(7, 3)) @ pathways
    strength = np.array([0.6, 0.8, 1.2, 1.4])
    changes = strength[:, None] * effects[:, None]
    return strength, changes + rng.normal(0, noise, changes.shape)


def test_groups_that_answer_more_strongly_are_told_from_known_treatments():
    strength, changes = world(np.random.default_rng(0))
    known = KnownChanges(changes[:6], np.full((6, 4), 100))
    np.testing.assert_allclose(known.sensitivity, strength / strength.mean(), rtol=0.05)


def test_a_new_treatment_made_of_known_pathways_is_carried_to_other_groups():
    rng = np.random.default_rng(1)
    _, changes = world(rng)
    known = KnownChanges(changes[:6], np.full((6, 4), 100))
    few = changes[6, [0]] + rng.normal(0, 0.3, (1, N_GENES))
    carried = known.carry(few, np.full((1, N_GENES), 0.09), [0]).in_groups[3]
    as_it_is, better = (np.square(c - changes[6, 3]).mean() for c in (few[0], carried))
    assert better < 0.25 * as_it_is


def test_what_no_known_treatment_does_is_carried_where_it_stands_out():
    rng = np.random.default_rng(2)
    strength, changes = world(rng)
    own = np.where(np.arange(N_GENES) < 20, 2.0, 0.0)
    known = KnownChanges(changes[:6], np.full((6, 4), 100))
    few = strength[0] * own[None] + rng.normal(0, 0.2, (1, N_GENES))
    carried = known.carry(few, np.full((1, N_GENES), 0.04), [0]).in_groups[3]
    assert carried[:20].mean() == pytest.approx(2.0 * strength[3], rel=0.2)
    assert np.abs(carried[20:]).mean() < 0.25 * 0.2 * strength[3] / strength[0]


def test_without_noise_and_known_treatments_the_change_is_carried_as_it_is():
    known = KnownChanges(np.empty((0, 2, 5)), np.empty((0, 2), dtype=int))
    new = np.array([[1.0, -2.0, 0.0, 0.5, 3.0]])
    carried = known.carry(new, np.full((1, 5), 1e-12), [0])
    np.testing.assert_allclose(carried.in_groups, np.tile(new, (2, 1)), rtol=1e-4)
    np.testing.assert_allclose(carried.elsewhere, new[0], rtol=1e-4)


def test_treatments_that_some_groups_did_not_see_count_where_they_were_seen():
    _, changes = world(np.random.default_rng(3))
    n_cells = np.full((6, 4), 100)
    n_cells[2, 1], changes[2, 1] = 0, np.nan
    known = KnownChanges(changes[:6], n_cells)
    assert np.isfinite(known.table).all()
    others = [0, 2, 3]
    expected = known.sensitivity[1] * changes[2, others].mean(axis=0)
    np.testing.assert_allclose(known.table[2, 1], expected)


def test_the_error_is_that_of_known_treatments_taken_for_new():
    covered = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        _, changes = world(rng)
        new = changes[6, [0]] + rng.normal(0, 0.3, (1, N_GENES))
        effects = BorrowedEffects(
            KnownChanges(changes[:6], np.full((6, 4), 100)),
            control=np.full((4, N_GENES), 3.0),
            new=new,
            variances=np.full((1, N_GENES), 0.09),
            seen=[0],
            n_cells=np.array([10]),
        )
        assert len(effects.errors) == 6 * 3
        for group in (1, 2, 3):
            change = effects.of(group).change(np.full(N_GENES, 3.0))
            error = np.sqrt(effects.error_variance(3.0 + change, change))
            covered.append(np.abs(change - changes[6, group]) < 1.645 * error)
    assert 0.85 < np.mean(covered) < 0.97


def test_a_group_of_which_nothing_is_known_answers_like_the_mean_of_the_others():
    _, changes = world(np.random.default_rng(4))
    known = KnownChanges(changes[:6], np.full((6, 4), 100))
    effects = BorrowedEffects(
        known,
        control=np.full((4, N_GENES), 3.0),
        new=changes[6],
        variances=np.full((4, N_GENES), 0.0025),
        seen=[0, 1, 2, 3],
        n_cells=np.full(4, 100),
    )
    elsewhere = effects.of(None).change(np.zeros(N_GENES))
    np.testing.assert_allclose(elsewhere, changes[6].mean(axis=0), atol=0.15)
    assert len(effects.errors) == 6 * 4  # seen everywhere: errors where it was seen
