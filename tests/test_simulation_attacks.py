import math
import pickle
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorsum.errors import UsageError
from quorsum.simulation.attacks import ATTACKS, AttackView, alie_z_max, parse_attack

OWN = np.array([3.0, -4.0, 0.0, 12.0])
HONEST = np.array([[1.0, 2.0, 0.0, 4.0], [3.0, 2.0, 0.0, 8.0]])


def view(seed: int = 0, **changed: object) -> AttackView:
    settings: dict[str, object] = {
        "own": OWN,
        "sites": 10,
        "malicious": 2,
        "rng": np.random.default_rng(seed),
        "honest": HONEST,
    }
    return AttackView(**(settings | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("none", OWN),
        ("label-flip", OWN),
        ("sign-flip", -8 * OWN),
        ("sign-flip:strength=2.5", -2.5 * OWN),
        ("scaling", 100 * OWN),
        ("alie:z=1.5", [2 - 1.5 * 1, 2, 0, 6 - 1.5 * 2]),
        ("ipm", [-1, -1, 0, -3]),
        ("ipm:epsilon=10", [-20, -20, 0, -60]),
    ],
)
def test_what_is_sent_by_hand(text: str, sent: object) -> None:
    assert parse_attack(text).poison_update(view()) == pytest.approx(np.asarray(sent))


def test_gaussian_has_the_stated_norm_and_is_repeatable() -> None:
    own = np.random.default_rng(1).normal(size=20_000)
    attack = parse_attack("gaussian:strength=7")
    sent = attack.poison_update(view(own=own, honest=None, seed=5))
    assert np.linalg.norm(sent) == pytest.approx(7 * np.linalg.norm(own), rel=0.02)
    assert abs(float(sent @ own)) < 0.05 * np.linalg.norm(sent) * np.linalg.norm(own)
    assert np.array_equal(sent, attack.poison_update(view(own=own, honest=None, seed=5)))
    assert not np.array_equal(sent, attack.poison_update(view(own=own, honest=None, seed=6)))


def test_nan_poisons_one_coordinate() -> None:
    sent = parse_attack("nan").poison_update(view())
    assert np.isnan(sent).sum() == 1
    assert np.array_equal(sent[~np.isnan(sent)], OWN[~np.isnan(sent)])


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_updates_keep_their_type_and_nothing_is_changed_in_place(name: str, dtype: type) -> None:
    own, honest = OWN.astype(dtype), HONEST.astype(dtype)
    before = own.copy(), honest.copy()
    sent = parse_attack(name).poison_update(view(own=own, honest=honest))
    assert sent.dtype == dtype
    assert sent.shape == own.shape
    assert not np.shares_memory(sent, own)
    assert np.array_equal(own, before[0])
    assert np.array_equal(honest, before[1])


def test_two_of_ten_turn_an_undefended_mean_back() -> None:
    honest = np.tile(OWN, (8, 1))
    attack = parse_attack("sign-flip")
    bad = [attack.poison_update(view(honest=None))] * 2
    assert float(np.vstack([honest, *bad]).mean(axis=0) @ OWN) < 0.0


@pytest.mark.parametrize("name", ATTACKS)
def test_omniscient_attacks_ask_for_the_honest_updates(name: str) -> None:
    attack = parse_attack(name)
    assert attack.needs_honest == (name in {"alie", "ipm"})
    if attack.needs_honest:
        for honest in (None, np.zeros((0, 4))):
            with pytest.raises(UsageError, match="needs the honest updates"):
                attack.poison_update(view(honest=honest))
    else:
        attack.poison_update(view(honest=None))


@given(labels=st.lists(st.integers(0, 6), max_size=30))
def test_flipping_labels_twice_gives_them_back(labels: list[int]) -> None:
    attack, y = parse_attack("label-flip"), np.array(labels, dtype=np.int64)
    flipped = attack.poison_labels(y, 7)
    assert attack.on_data
    assert flipped.tolist() == [6 - label for label in labels]
    assert np.array_equal(attack.poison_labels(flipped, 7), y)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "label-flip"])
def test_other_attacks_leave_labels(name: str) -> None:
    attack, y = parse_attack(name), np.array([0, 1, 2])
    assert not attack.on_data
    same = attack.poison_labels(y, 3)
    assert np.array_equal(same, y)
    assert same is not y


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(label: int) -> None:
    with pytest.raises(UsageError, match=r"0 \.\. 2"):
        parse_attack("label-flip").poison_labels(np.array([0, label]), 3)


@pytest.mark.parametrize(
    ("sites", "malicious", "probability"),
    # n = 50, m = 24 is the setting of the paper: s = 26 - 24 = 2 supporters among 26 honest sites.
    [(50, 24, 24 / 26), (50, 12, 24 / 38), (10, 3, 4 / 7), (11, 5, 5 / 6)],
)
def test_alie_shift_is_that_of_the_paper(sites: int, malicious: int, probability: float) -> None:
    assert alie_z_max(sites, malicious) == pytest.approx(NormalDist().inv_cdf(probability))


def test_alie_shifts_all_the_same_where_the_paper_has_no_shift_for_few_attackers() -> None:
    assert alie_z_max(10, 2) == 0.0
    assert alie_z_max(10, 1) == 0.0
    assert alie_z_max(2, 1) == 0.0
    sent = parse_attack("alie").poison_update(view())
    assert np.allclose(sent, HONEST.mean(axis=0) - 1.5 * HONEST.std(axis=0))


@pytest.mark.parametrize(("sites", "malicious"), [(10, 6), (10, 0), (1, 1)])
def test_alie_refuses_a_dishonest_majority(sites: int, malicious: int) -> None:
    with pytest.raises(UsageError, match="alie needs"):
        alie_z_max(sites, malicious)


@pytest.mark.parametrize(
    "text", [*ATTACKS, "sign-flip:strength=3", "alie:z=0.123456789012", "ipm:epsilon=1e-9", "gaussian:strength=1e+20"]
)
def test_text_reads_back_and_attacks_travel(text: str) -> None:
    attack = parse_attack(text)
    assert parse_attack(str(attack)) == attack or any(math.isnan(value) for _, value in attack.parameters)
    assert str(parse_attack(str(attack))) == str(attack)
    assert str(pickle.loads(pickle.dumps(attack))) == str(attack)  # noqa: S301 - made one line above


def test_blanks_are_allowed() -> None:
    assert parse_attack(" sign-flip : strength = 3 ") == parse_attack("sign-flip:strength=3")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sign-flop", r"did you mean sign-flip\?"),
        ("", "known: none, sign-flip"),
        ("sign-flip:power=3", "no parameter 'power'; its parameters: strength"),
        ("none:strength=3", "its parameters: none"),
        ("sign-flip:strength=3,strength=4", "given twice"),
        ("sign-flip:strength", "finite number above 0"),
        ("sign-flip:strength=many", "finite number above 0, got 'many'"),
        ("sign-flip:strength=0", "finite number above 0"),
        ("sign-flip:strength=-1", "finite number above 0"),
        ("alie:z=nan", "finite number above 0"),
        ("ipm:epsilon=inf", "finite number above 0"),
    ],
)
def test_texts_that_are_no_attack(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_attack(text)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"own": np.zeros((2, 2))}, "own must be"),
        ({"own": np.array([1, 2, 3, 4])}, "own must be"),
        ({"malicious": 0}, "malicious must lie in"),
        ({"malicious": 11}, "malicious must lie in"),
        ({"honest": np.zeros((2, 3))}, "honest must have shape"),
        ({"honest": np.zeros(4)}, "honest must have shape"),
    ],
)
def test_views_that_cannot_be(changed: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        view(**changed)  # type: ignore[arg-type]
