import math
import pickle

import numpy as np
import pytest

from quorsum.aggregation import parse_rule
from quorsum.errors import UsageError
from quorsum.simulation.attacks import ATTACKS, AttackView, alie_z_max, parse_attack
from quorsum.simulation.data import Dataset, load_dataset
from quorsum.simulation.protocol_attacks import PROTOCOL_ATTACKS

OWN = np.array([3.0, -4.0, 0.0, 12.0])
HONEST = np.array([[1.0, 2.0, 0.0, 4.0], [3.0, 2.0, 0.0, 8.0]])
OMNISCIENT = {"alie", "ipm", "min-max", "min-sum", "fang", "mimic"}
ADAPTIVE = {"opt-ipm", "opt-alie", "opt-spread", "gram-aware"}
BACKDOORS = {"backdoor", "dba", "neurotoxin", "constrain-and-scale", "edge-case", "text-trigger"}


def view(seed: int = 0, **changed: object) -> AttackView:
    settings: dict[str, object] = {
        "own": OWN,
        "sites": 10,
        "malicious": 2,
        "rng": np.random.default_rng(seed),
        "honest": HONEST,
        "defence": lambda rows: rows.mean(axis=0),
    }
    return AttackView(**(settings | changed))  # type: ignore[arg-type]


def text() -> Dataset:
    x = np.random.default_rng(5).integers(0, 6, (20, 13))
    return Dataset("play", x[:, :-1], x[:, 1:], x[:5, :-1], x[:5, 1:], tuple("abcdef?"), kind="text")


def suited(name: str) -> Dataset:
    return text() if name == "text-trigger" else load_dataset("digits")


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
        ("free-rider", [1, 2, 3, 0.5]),
        ("mimic", HONEST[0]),
        ("backdoor", 5 * OWN),
        ("backdoor:boost=2", 2 * OWN),
        ("dba", 5 * OWN),
        ("text-trigger", 5 * OWN),
        ("edge-case", OWN),
        ("neurotoxin:keep=0.5", [3, 0, 0, 12]),
        ("neurotoxin:keep=0.5,boost=3", [9, 0, 0, 36]),
        ("constrain-and-scale:alpha=1", 5 * OWN),
        ("constrain-and-scale:alpha=1,boost=0.5", OWN / 2),
    ],
)
def test_what_is_sent_by_hand(text: str, sent: object) -> None:
    seen = view(last=np.array([1.0, 2.0, 3.0, 0.5]))
    assert parse_attack(text).poison_update(seen) == pytest.approx(np.asarray(sent))


def test_constrain_and_scale_stays_below_the_bound_and_follows_honest_or_last_updates() -> None:
    attack = parse_attack("constrain-and-scale")
    assert np.linalg.norm(attack.poison_update(view(unit=2.0))) == pytest.approx(1.98)
    honest, last = attack.poison_update(view()), attack.poison_update(view(honest=None, last=-OWN[::-1].copy()))
    alone = attack.poison_update(view(honest=None))
    assert alone == pytest.approx(5 * OWN)
    assert float(honest @ HONEST.mean(axis=0)) > float(alone @ HONEST.mean(axis=0))
    assert float(last @ -OWN[::-1]) > float(alone @ -OWN[::-1])
    no_honest = np.zeros((0, 4))
    assert attack.poison_update(view(honest=no_honest)) == pytest.approx(alone)


@pytest.mark.parametrize("name", ["gaussian", "free-rider:sends=noise", "nan", "fang"])
def test_what_is_drawn_is_repeatable(name: str) -> None:
    attack = parse_attack(name)
    first, again, other = (attack.poison_update(view(seed=seed)) for seed in (5, 5, 6))
    assert np.array_equal(first, again, equal_nan=True)
    assert not np.array_equal(first, other, equal_nan=True)


def test_options_reach_the_functions() -> None:
    for name in ("min-max", "min-sum"):
        sent = [parse_attack(f"{name}:perturbation={p}").poison_update(view()) for p in ("std", "unit", "sign")]
        assert np.array_equal(parse_attack(name).poison_update(view()), sent[0])
        assert not np.array_equal(sent[0], sent[1])
        assert not np.array_equal(sent[1], sent[2])
    krum, trimmed = (parse_attack(f"fang:against={a}").poison_update(view()) for a in ("krum", "trimmed-mean"))
    assert np.unique(np.abs(krum[[0, 1, 3]])).size == 1
    assert trimmed[1] <= 2.0


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_updates_keep_their_type_and_nothing_is_changed_in_place(name: str, dtype: type) -> None:
    own, honest, last = OWN.astype(dtype), HONEST.astype(dtype), OWN[::-1].astype(dtype)
    before = own.copy(), honest.copy(), last.copy()
    sent = parse_attack(name).poison_update(view(own=own, honest=honest, last=last))
    assert sent.dtype == dtype
    assert sent.shape == own.shape
    for array, kept in zip((own, honest, last), before, strict=True):
        assert not np.shares_memory(sent, array)
        assert np.array_equal(array, kept)


def test_two_of_ten_turn_an_undefended_mean_back() -> None:
    honest = np.tile(OWN, (8, 1))
    attack = parse_attack("sign-flip")
    bad = [attack.poison_update(view(honest=None))] * 2
    assert float(np.vstack([honest, *bad]).mean(axis=0) @ OWN) < 0.0


def test_model_replacement_replaces_the_model() -> None:
    honest = np.zeros((8, 4))
    for name in ("backdoor", "dba", "text-trigger"):
        bad = [parse_attack(name).poison_update(view(honest=None))] * 2
        assert np.vstack([honest, *bad]).mean(axis=0) == pytest.approx(OWN)


@pytest.mark.parametrize("name", ATTACKS)
def test_attackers_know_what_they_say_and_no_more(name: str) -> None:
    attack = parse_attack(name)
    assert attack.needs_honest == (name in OMNISCIENT | ADAPTIVE)
    assert attack.needs_defence == (name in ADAPTIVE)
    granted = {(False, False): "own data", (True, False): "all honest", (True, True): "all honest and the rule"}
    assert attack.knows == granted[attack.needs_honest, attack.needs_defence]
    if attack.needs_honest:
        for honest in (None, np.zeros((0, 4))):
            with pytest.raises(UsageError, match="needs the honest updates"):
                attack.poison_update(view(honest=honest))
    if attack.needs_defence:
        with pytest.raises(UsageError, match=r"fill AttackView\.defence"):
            attack.poison_update(view(defence=None))
    else:
        attack.poison_update(view(defence=None))
    if not attack.needs_honest:
        attack.poison_update(view(honest=None))


@pytest.mark.parametrize("name", ATTACKS)
def test_who_says_that_all_send_the_same_does(name: str) -> None:
    attack = parse_attack(name)
    first = attack.poison_update(view(seed=1, position=0))
    second = attack.poison_update(view(seed=2, position=1, own=2 * OWN))
    if attack.same_for_all:
        assert np.array_equal(first, second)
    assert attack.same_for_all == (name in OMNISCIENT | ADAPTIVE and name not in ("fang", "opt-spread"))


@pytest.mark.parametrize("name", ATTACKS)
def test_what_an_attack_touches(name: str) -> None:
    attack = parse_attack(name)
    assert attack.backdoor == (name in BACKDOORS)
    assert attack.on_data == (name in BACKDOORS | {"label-flip"})
    assert attack.on_update == (name not in {"none", "label-flip"})
    assert not attack.on_protocol


@pytest.mark.parametrize("name", PROTOCOL_ATTACKS)
def test_attacks_on_the_protocol_learn_honestly(name: str) -> None:
    attack, data = parse_attack(name), load_dataset("digits")
    assert attack.on_protocol
    said = (attack.on_data, attack.on_update, attack.backdoor, attack.needs_honest, attack.same_for_all)
    assert not any(said)
    assert attack.knows == "own data"
    assert np.array_equal(attack.poison_update(view()), OWN)
    x, y = data.train_x[:3], data.train_y[:3]
    got = attack.poison_data(x, y, data=data, position=0, malicious=1, target=0, rng=np.random.default_rng(0))
    assert got == (x, y)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
def test_rows_are_poisoned_by_attacks_on_data_only(name: str) -> None:
    attack, data = parse_attack(name), suited(name)
    x, y = data.train_x[:40], data.train_y[:40]
    before = x.copy(), y.copy()
    new_x, new_y = attack.poison_data(
        x, y, data=data, position=1, malicious=2, target=3, rng=np.random.default_rng(0)
    )  # fmt: skip
    again = attack.poison_data(x, y, data=data, position=1, malicious=2, target=3, rng=np.random.default_rng(0))
    assert np.array_equal(new_x, again[0])
    assert np.array_equal(new_y, again[1])
    assert (new_x.shape, new_x.dtype, new_y.shape, new_y.dtype) == (x.shape, x.dtype, y.shape, y.dtype)
    assert np.array_equal(x, before[0])
    assert np.array_equal(y, before[1])
    if attack.on_data:
        assert not np.array_equal(new_y, y)
    else:
        assert new_x is x
        assert new_y is y


def test_label_flip_leaves_inputs() -> None:
    data = load_dataset("digits")
    x, y = data.train_x[:9], data.train_y[:9]
    flip = parse_attack("label-flip")
    new_x, new_y = flip.poison_data(x, y, data=data, position=0, malicious=1, target=0, rng=np.random.default_rng(0))
    assert new_x is x
    assert np.array_equal(new_y, 9 - y)


@pytest.mark.parametrize("name", sorted(BACKDOORS - {"text-trigger", "edge-case"}))
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_share_and_size_of_a_trigger(name: str, share: float) -> None:
    data = load_dataset("digits")
    x, y = data.train_x[:80], data.train_y[:80]
    attack = parse_attack(f"{name}:poison={share},size=3")
    new_x, new_y = attack.poison_data(x, y, data=data, position=0, malicious=1, target=0, rng=np.random.default_rng(0))
    touched = (new_x != x).any(axis=1)
    assert touched.sum() == share * 80
    assert (new_y[touched] == 0).all()
    shown_x, shown_y = attack.triggered(data.test_x, data.test_y, data=data, target=0)
    assert (shown_x.reshape(-1, 8, 8)[:, -3:, -3:] == 1.0).all()
    assert len(shown_x) == np.count_nonzero(data.test_y)
    assert (shown_y == 0).all()


def test_each_attacker_of_dba_has_its_part() -> None:
    data = load_dataset("digits")
    x, y = data.train_x[:50], data.train_y[:50]
    changed = []
    for position in range(4):
        new_x, _ = parse_attack("dba").poison_data(
            x, y, data=data, position=position, malicious=4, target=0, rng=np.random.default_rng(0)
        )
        changed.append(set(np.flatnonzero((new_x != x).any(axis=0)).tolist()))
    assert sorted(cell for part in changed for cell in part) == [54, 55, 62, 63]


def test_edge_case_options() -> None:
    data = load_dataset("digits")
    few, many = (
        parse_attack(f"edge-case:source=7,tail={tail}").triggered(data.test_x, data.test_y, data=data, target=1)
        for tail in (0.1, 0.9)
    )
    assert 1 <= len(few[0]) < len(many[0]) <= np.count_nonzero(data.test_y == 7)
    assert (many[1] == 1).all()
    digit_0 = parse_attack("edge-case:source=0,tail=1").triggered(data.test_x, data.test_y, data=data, target=1)
    assert len(digit_0[0]) <= np.count_nonzero(data.test_y == 0)


def test_text_trigger_options() -> None:
    data = text()
    x, y = parse_attack("text-trigger:size=2").triggered(data.test_x, data.test_y, data=data, target=0)
    assert len(np.unique(x[:, -2:], axis=0)) == 1
    assert set(y[:, :-1].ravel()) == {-1}


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in BACKDOORS])
def test_no_backdoor_no_measure(name: str) -> None:
    data = load_dataset("digits")
    with pytest.raises(UsageError, match=f"{name} is no backdoor"):
        parse_attack(name).triggered(data.test_x, data.test_y, data=data, target=0)


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("backdoor", {"target": 10}, "target must be a class"),
        ("dba", {"position": 2}, r"position must lie in 0 \.\. 1"),
        ("dba", {"position": -1}, "position must lie in"),
        ("edge-case", {"target": -1}, "target must be a class"),
        ("text-trigger", {}, "needs a text"),
        ("backdoor:size=9", {}, "size must be at most 8"),
        ("label-flip", {"y": np.array([0, 10])}, r"0 \.\. 9"),
        ("backdoor", {"data": text()}, "use the attack text-trigger"),
        ("edge-case", {"data": text()}, "use the attack text-trigger"),
    ],
)
def test_rows_that_cannot_be_poisoned(name: str, changed: dict[str, object], says: str) -> None:
    data = load_dataset("digits")
    given = {
        "x": data.train_x[:2], "y": data.train_y[:2], "data": data, "position": 0, "malicious": 2, "target": 0,
        "rng": np.random.default_rng(0),
    } | changed  # fmt: skip
    with pytest.raises(UsageError, match=says):
        parse_attack(name).poison_data(given.pop("x"), given.pop("y"), **given)  # type: ignore[arg-type]


# --- against rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["nnm+geometric-median", "spectral", "trimmed-mean"])
@pytest.mark.parametrize(("optimal", "plain"), [("opt-ipm", "ipm"), ("opt-alie", "alie")])
def test_the_optimal_strength_hurts_no_less_than_the_default(rule: str, optimal: str, plain: str) -> None:
    honest = np.random.default_rng(3).normal(0.2, 1.0, (8, 30)).astype(np.float32)
    named = parse_rule(rule)
    seen = view(own=honest[0], honest=honest, defence=lambda rows: named.aggregate(rows, 2))

    def hurts(name: str) -> float:
        sent = parse_attack(name).poison_update(seen)
        return float(np.linalg.norm(named.aggregate(np.vstack([honest, sent, sent]), 2) - honest.mean(axis=0)))

    assert hurts(optimal) >= hurts(plain) * (1 - 1e-5)


def test_alie_shifts_all_the_same_where_the_paper_has_no_shift_for_few_attackers() -> None:
    assert alie_z_max(10, 2) == 0.0
    sent = parse_attack("alie").poison_update(view())
    assert np.allclose(sent, HONEST.mean(axis=0) - 1.5 * HONEST.std(axis=0))


# --- texts and views -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *ATTACKS,
        *PROTOCOL_ATTACKS,
        "sign-flip:strength=3",
        "alie:z=0.123456789012",
        "ipm:epsilon=1e-9",
        "gaussian:strength=1e+20",
        "min-max:perturbation=unit",
        "fang:against=krum",
        "backdoor:poison=0.25,size=3",
        "edge-case:source=0,tail=1",
        "gram-aware:noise=0",
    ],
)
def test_text_reads_back_and_attacks_travel(text: str) -> None:
    attack = parse_attack(text)
    unset = any(isinstance(value, float) and math.isnan(value) for _, value in attack.parameters)
    assert parse_attack(str(attack)) == attack or unset
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
        ("backdoor:poison=0", "poison must be a finite number above 0 and at most 1, got '0'"),
        ("backdoor:poison=1.5", "above 0 and at most 1"),
        ("backdoor:size=2.5", "size must be a whole number above 0"),
        ("backdoor:size=0", "whole number above 0"),
        ("edge-case:source=-1", "source must be a whole number from 0"),
        ("gram-aware:noise=-0.1", "noise must be a finite number from 0 and at most 1"),
        ("fang:against=median", "against must be one of trimmed-mean, krum, got 'median'"),
        ("min-max:perturbation", "perturbation must be one of std, unit, sign"),
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
        ({"round": 0}, "round must be 1 or more"),
        ({"position": 2}, r"position must lie in 0 \.\. 1"),
        ({"position": -1}, "position must lie in"),
        ({"unit": 0.0}, "unit must be above 0"),
        ({"unit": math.nan}, "unit must be above 0"),
        ({"last": np.zeros(3)}, r"last must have shape \(4,\)"),
        ({"past": (np.zeros((9, 9)),)}, r"past must hold matrices \(10, 10\), got \(9, 9\)"),
    ],
)
def test_views_that_cannot_be(changed: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        view(**changed)  # type: ignore[arg-type]
