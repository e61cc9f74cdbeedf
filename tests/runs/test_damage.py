"""Damaged files: whatever happens to one, the numbers are the same or a sentence names it."""

import random
import shutil
import warnings
from collections import Counter

import pytest
from PIL import Image

import normlab as nl
from normlab.recipes import OPEN_ENDED
from normlab.runs.folder import RunFolder

RECIPE = nl.Recipe(epochs=3, batch_size=32, lr=0.1)
RATES = {"one": 0.1, "other": 0.2}


def fit(tiny, tiny_network, place, which, **changes):
    """The run of a name: "one" or "other"."""
    seed = list(RATES).index(which)
    recipe = RECIPE.replace(seed=seed, lr=RATES[which], **changes)
    options = {"directory": place / which, "device": "cpu", "progress": False}
    return nl.fit(tiny_network("bn", seed), tiny, recipe, **options)


def facts_of(run):
    """What a run reports: losses and accuracies, its predictions and its weights."""
    rows = [[value for key, value in row.items() if key != "seconds"] for row in run.history]
    weights = {name: value.tolist() for name, value in run.network.state_dict().items()}
    return rows, run.predicted.tolist(), run.probability.tolist(), weights, run.recipe


@pytest.fixture(scope="module")
def at_work(tiny, tiny_network, tiny_assignment, tmp_path_factory):
    """A folder for each kind of thing, each with two, and functions that ask for the first."""
    place = tmp_path_factory.mktemp("whole")
    save = RunFolder.save_epoch

    def stop_after_the_second(self, network, optimizer, history):
        save(self, network, optimizer, history)
        if len(history) == 2:
            raise KeyboardInterrupt

    def sweep(folder, which="one"):
        axes = {"norms": ["bn", "gn"], "lrs": [RATES[which], 1e30], "epochs": 1}
        options = {"directory": folder / which, "device": "cpu", "progress": False}
        table = nl.run_sweep(tiny_assignment, data=tiny, **axes, **options)
        return table.drop(columns="seconds").to_csv()

    images = tmp_path_factory.mktemp("images")

    def cache(folder, which="one"):
        """Of what is decoded anew a warning tells, here as an error."""
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            patch.setenv("XDG_CACHE_HOME", str(folder / which))
            data = nl.load_dataset(images / which)
        assert data.test_images.unique().tolist() == [list(RATES).index(which), 9]
        if said:
            raise ValueError(str(said[0].message))
        return data.fingerprint

    for number, which in enumerate(RATES):
        for name in ("train/a", "train/b", "test/a", "test/b"):
            (images / which / name).mkdir(parents=True)
            shade = number if name.endswith("a") else 9
            Image.new("L", (8, 8), shade).save(images / which / name / "0.png")
        cache(place / "caches", which)
        fit(tiny, tiny_network, place / "finished", which)
        for schedule in OPEN_ENDED:
            fit(tiny, tiny_network, place / schedule, which, schedule=schedule)
        sweep(place / "sweeps", which)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, "save_epoch", stop_after_the_second)
            with pytest.raises(KeyboardInterrupt):
                fit(tiny, tiny_network, place / "interrupted", which)

    def first(folder, **changes):
        return facts_of(fit(tiny, tiny_network, folder, "one", **changes))

    def go_on(folder):
        """At a rate that knows of no end: as far as it is, or at once for two epochs more."""
        changes = {"schedule": folder.name}
        found = [first(folder, **changes)] if folder.name == "plateau" else []
        return *found, first(folder, epochs=5, **changes)

    kinds = {"finished": first, "interrupted": first, "sweeps": sweep, "caches": cache}
    return place, kinds | dict.fromkeys(sorted(OPEN_ENDED), go_on)


def flipped(content, chance, _):
    bit = chance.randrange(8 * len(content))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flipped_in_the_head(content, chance, _):
    """Where the text is: in the weights of larger files hardly any bit of it would be hit."""
    return flipped(content[:3000], chance, _) + content[3000:]


def cut(content, chance, _):
    return content[: chance.randrange(len(content))]


def cut_inside(content, chance, _):
    start = chance.randrange(len(content))
    return content[:start] + content[start + chance.randint(1, 40) :]


def exchanged(content, chance, other):
    return other


def partly_exchanged(content, chance, other):
    place = chance.randrange(len(content))
    return content[:place] + other[place:]


def lost(content, chance, _):
    return None


# Every second damage is to this file: a run that goes on does not read most of the others.
MATTERS = {"sweeps": "sweep.csv"} | dict.fromkeys(OPEN_ENDED, "checkpoint.safetensors")
DAMAGES = [flipped, flipped_in_the_head, cut, cut_inside, exchanged, partly_exchanged, lost]


def counterpart(file, folder):
    """The same file of the other run, sweep or cache."""
    path = file.relative_to(folder / "one")
    if folder.name == "caches":
        return next(folder.glob("other/**/*.safetensors"))
    if path.parts[0] != "runs":
        return folder / "other" / path
    return next(folder.glob(f"other/runs/{path.parts[1].split('-')[0]}*/*/{path.name}"))


def outcome(kind, ask, place, expected, chance):
    """Damages a file of a copy, asks for what lies there, and says what came of it."""
    folder = place / kind
    files = [file for file in sorted(folder.glob("one/**/*")) if file.is_file()]
    file, damage = chance.choice(files), chance.choice(DAMAGES)
    if kind in MATTERS and chance.random() < 0.5:
        file = folder / "one" / MATTERS[kind]
    content = damage(file.read_bytes(), chance, counterpart(file, folder).read_bytes())
    file.unlink() if content is None else file.write_bytes(content)
    what = f"{kind}: {damage.__name__} {file.relative_to(folder)}"
    try:
        found, problem = ask(folder), None
    except (ValueError, OSError) as error:
        found, problem = None, str(error)
    assert problem or found == expected, f"{what}: silently wrong"
    if problem is None:
        return "harmless"
    assert str(file.parent) in problem, f"{what}: not named: {problem}"
    assert "\n" not in problem, f"{what}: no sentence: {problem}"
    return "named"


def assert_told(at_work, tmp_path, count, seed):
    """Counts what became of so many damages."""
    whole, askers = at_work
    chance, found, expected = random.Random(seed), Counter(), {}
    for kind, ask in askers.items():
        shutil.copytree(whole / kind, tmp_path / "truth" / kind)
        expected[kind] = ask(tmp_path / "truth" / kind)
    for _ in range(count):
        kind = chance.choice(list(askers))
        shutil.copytree(whole / kind, tmp_path / "damaged" / kind)
        came = outcome(kind, askers[kind], tmp_path / "damaged", expected[kind], chance)
        found[kind, came] += 1
        shutil.rmtree(tmp_path / "damaged")
    print(dict(found))
    assert sum(found.values()) == count
    return found


def test_damage_is_harmless_or_named(at_work, tmp_path):
    found = assert_told(at_work, tmp_path, 70, seed=0)
    assert found["finished", "named"] > found["finished", "harmless"]


@pytest.mark.slow
def test_a_thousand_damages_are_harmless_or_named(at_work, tmp_path):
    assert_told(at_work, tmp_path, 1000, seed=1)
