"""Search spaces: Hydra's sweep syntax as dimensions, as a grid, as Optuna's distributions."""

import pytest

from launch.sweep import space


def one(text):
    fixed, (dimension,) = space.parse([text])
    assert fixed == []
    return dimension


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("model=deepfm,din", ("deepfm", "din")),
        ("+model=choice(deepfm, din)", ("deepfm", "din")),
        ("lr=1e-3,3e-4", ("0.001", "0.0003")),
        ("units=[64,32],[128]", ("[64,32]", "[128]")),
        ("name='a b',c", ("'a b'", "c")),
        ("k=range(1,8,3)", ("1", "4", "7")),
        ("k=range(3)", ("0", "1", "2")),
        ("x=range(0.1,0.5,0.1)", ("0.1", "0.2", "0.3", "0.4")),
        ("k=shuffle(1,2,3)", ("1", "2", "3")),
    ],
)
def test_values_of_a_grid(text, values):
    dimension = one(text)
    assert dimension.values == values
    assert dimension.key == text.partition("=")[0]


def test_what_is_not_swept_is_the_same_for_all_and_the_last_key_changes_fastest():
    fixed, dimensions = space.parse(["a=1", "b=1,2", "c=[1,2]", "~d", "e=x,y"])
    assert fixed == ["a=1", "c=[1,2]", "~d"]
    pairs = [(trial["b"], trial["e"]) for trial in space.grid(dimensions)]
    assert pairs == [("1", "x"), ("1", "y"), ("2", "x"), ("2", "y")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=interval(1e-4,1e-2)", "FloatDistribution(high=0.01, log=False, low=0.0001, step=None)"),
        ("lr=tag(log,interval(1e-4,1e-2))", "FloatDistribution(high=0.01, log=True, low=0.0001, step=None)"),
        ("k=int(interval(1,8))", "IntDistribution(high=8, log=False, low=1, step=1)"),
        ("k=tag(log,int(interval(1,8)))", "IntDistribution(high=8, log=True, low=1, step=1)"),
        ("k=range(1,8,3)", "IntDistribution(high=7, log=False, low=1, step=3)"),
        ("k=tag(log,range(1,9))", "IntDistribution(high=8, log=True, low=1, step=1)"),
        ("x=range(0.1,0.5,0.1)", "FloatDistribution(high=0.4, log=False, low=0.1, step=0.1)"),
        ("m=deepfm,din", "CategoricalDistribution(choices=('deepfm', 'din'))"),
    ],
)
def test_what_optuna_draws_from(text, expected):
    pytest.importorskip("optuna")
    study = pytest.importorskip("launch.sweep.study")
    assert str(study.distribution(one(text))) == expected


def test_a_space_without_end_is_refused():
    for text in ("k=range(0,1000000000000)", "x=range(0.0,1e12,1e-3)", "x=range(0.0,1.0,0.0)"):
        with pytest.raises(ValueError, match=r"more than|STEP above 0"):
            next(space.grid([one(text)]))
    with pytest.raises(ValueError, match="a grid of 1,000,000 trials"):
        next(space.grid([one(f"{name}=range(0,100)") for name in "abc"]))
    assert one("k=range(0,1000000000000)").high == 999_999_999_999  # a search may draw from it


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lr=interval(1e-2,1e-4)"], "LOW below HIGH"),
        (["lr=tag(log,interval(0,1))"], "above 0 for log"),
        (["model=glob(*)"], "list the names"),
        (["lr=1,1"], "listed twice"),
        (["lr=1,2", "lr=3,4"], "swept twice"),
        (["k=range(5,1)"], "START below STOP"),
        (["k=tag(log,range(1,9,2))"], "has no step"),
        (["lr=interval(1"], "is not an override"),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        space.parse(overrides)
    assert "\n" not in str(caught.value)


def test_an_interval_is_no_grid():
    with pytest.raises(ValueError, match="sweep=optuna"):
        list(space.grid([one("lr=interval(0,1)")]))
