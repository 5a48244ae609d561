"""What the networks are told of a condition."""

import torch
from torch.testing import assert_close

from discover_sc._conditions import Conditions, ConditionVectors

CODES = torch.tensor([[0, 2], [1, 0], [1, 1]])


def test_a_plain_level_is_a_unit_vector_and_keys_stand_side_by_side():
    conditions = Conditions([torch.eye(2), torch.eye(3)])
    expected = [[1, 0, 0, 0, 1], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0]]
    assert_close(conditions(CODES), torch.tensor(expected).float())


def test_unit_vectors_pick_the_learned_vector_of_each_level():
    vectors = ConditionVectors([2, 3], n_output=4)
    result = vectors(Conditions([torch.eye(2), torch.eye(3)])(CODES))
    first, second = (embedding.weight for embedding in vectors.embeddings)
    assert torch.equal(result, first[CODES[:, 0]] + second[CODES[:, 1]])


def test_a_combination_adds_the_vectors_of_its_parts():
    design = torch.tensor([[1, 0], [0, 1], [1, 1]])  # A, B, A+B
    vectors = ConditionVectors([2], n_output=4)
    a, b, both = vectors(Conditions([design])(torch.arange(3).unsqueeze(1)))
    assert_close(both, a + b)


def test_a_dose_multiplies_the_row_by_saturating_responses_of_the_first_key_only():
    conditions = Conditions([torch.eye(2), torch.eye(3)], torch.tensor([1.0, 3.0]))
    assert conditions.n_features == [4, 3]
    features = conditions(CODES, torch.tensor([[0.0], [1.0], [3.0]]))
    expected = [  # response with k = 1 of both levels, with k = 3 of both levels, second key
        [0, 0, 0, 0, 0, 0, 1],
        [0, 1 / 2, 0, 1 / 4, 1, 0, 0],
        [0, 3 / 4, 0, 1 / 2, 0, 1, 0],
    ]
    assert_close(features, torch.tensor(expected))


def test_rows_that_were_never_registered_can_be_asked_about():
    conditions = Conditions([torch.eye(2)], torch.tensor([1.0]))
    features = conditions.respond(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0]]))
    assert_close(features, torch.tensor([[0.5, 0.5]]))
