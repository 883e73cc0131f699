"""Configurations: wrong ones end early with the way out, and every field has a reader."""

from __future__ import annotations

import ast
import errno
import math
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from absl import flags

from duc_dlc_jax import cli, sharding
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.models import weights
from networks import Device
from repository import ROOT, parsed

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def written(tmp_path, *lines) -> pathlib.Path:
    """A configuration file with these lines between `default()` and its return."""
    path = tmp_path / "mine.py"
    body = "\n".join(f"    {line}" for line in ("config = base.default()", *lines, "return config"))
    path.write_text(f"from duc_dlc_jax import config as base\n\n\ndef get_config():\n{body}\n")
    return path


# Wrong configurations


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("train.batchsize", "train.batch_size"),
        ("train.batch_sise", "train.batch_size"),
        ("model.dlc_rate", "model.dlc_rates"),
        ("optimiser.momentum", "optimizer.momentum"),
        ("sede", "seed"),
    ],
)
def test_an_unknown_field_gives_the_nearest_name(wrong, nearest):
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.check_field_name(wrong)
    assert str(error.value) == f"unknown configuration field {wrong}; the nearest one is {nearest}"
    config_lib.check_field_name(nearest)


def test_a_group_of_fields_is_no_field():
    with pytest.raises(
        config_lib.ConfigError, match=r"loss is a group of fields: loss\.\w+, loss\.\w+"
    ):
        config_lib.check_field_name("loss")


@pytest.mark.parametrize("form", ["--config.train.epoch=3", "-config.train.epoch=3"])
def test_an_unknown_field_on_the_command_line_ends_in_one_line(form, capsys):
    with pytest.raises(SystemExit) as end:
        cli._parse(["main", "--config=configs/demo.py", form])
    assert end.value.code == 2
    expected = "error: unknown configuration field train.epoch; the nearest one is train.epochs\n"
    assert capsys.readouterr().err == expected


COMMANDS = re.findall(  # modules, and the flags beside them
    r"^\| `python -m (duc_dlc_jax\.[\w.]+)` \|[^|]+\|(.+)\|$",
    (ROOT / "README.md").read_text(),
    re.MULTILINE,
)


SHARED = {  # flags that several commands define by one function, and other documents name
    "duc_dlc_jax.main": {"coordinator", "processes", "process"},
    "duc_dlc_jax.evaluate": {"set"},
    "duc_dlc_jax.predict": {"set"},
    "duc_dlc_jax.submit": {"set"},
    "duc_dlc_jax.benchmark": {"protocol", "set"},
}


@pytest.fixture
def started(monkeypatch):
    """Calls a function in place of a module's command, once its flags are defined."""
    before = set(flags.FLAGS)

    def start(module, function):
        monkeypatch.setattr(cli, "run", lambda main: function())
        monkeypatch.setattr(sys, "argv", [module])
        path = ROOT / module.replace(".", "/")
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        runpy.run_path(str(path), run_name="__main__")

    yield start
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.mark.parametrize(("module", "cell"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_help_has_the_flags_that_the_readme_names(module, cell, started):
    shown = []
    started(module, lambda: shown.append(flags.FLAGS.main_module_help()))
    named = set(re.findall(r"--(\w+)", cell)) | SHARED.get(module, set())
    assert named <= set(re.findall(r"^ +--(?:\[no\])?(\w+):", shown[0], re.MULTILINE))


@pytest.mark.parametrize(
    ("module", "word", "message"),
    [
        ("benchmark", "--what=", "flag --what=[]: no name; allowed: train, infer, input,"),
        ("benchmark", "--what=train,trian", "'trian'; allowed: train, infer, input,"),
        ("export", "--format=", "flag --format=[]: no name; allowed: stablehlo, onnx"),
        ("export", "--format=tflite", "'tflite'; allowed: stablehlo, onnx"),
    ],
)
def test_lists_of_names(module, word, message, started, capsys):
    argv = [module, word] + ["--config=configs/demo.py"] * (module == "benchmark")
    with pytest.raises(SystemExit) as end:
        started(f"duc_dlc_jax.{module}", lambda: cli._parse(argv))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_help_is_no_error(capsys):
    cli.app.define_help_flags()
    with pytest.raises(SystemExit) as end:
        cli._parse(["main", "--help"])
    assert end.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_a_list_of_names_is_given_once():
    """The last of several would be the only one, without a word."""
    cli.define_names("letters", ("a", "b"), "Some.")
    try:
        flags.FLAGS(["main", "--letters=b,a"])
        assert flags.FLAGS.letters == ["b", "a"]
        flags.FLAGS["letters"].present = 0
        with pytest.raises(flags.Error, match=r"letters.*: given more than once; separate the"):
            flags.FLAGS(["main", "--letters=a", "--letters=b"])
    finally:
        delattr(flags.FLAGS, "letters")
        flags.FLAGS.unparse_flags()


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def command(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.app, "run", lambda main, flags_parser: main([]))
    with pytest.raises(SystemExit) as end:
        cli.run(command)
    assert (end.value.code, capsys.readouterr().err) == (130, "error: interrupted\n")


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOTDIR, errno.EEXIST, errno.EISDIR])
def test_a_path_that_stays_wrong_is_no_reason_to_restart(code):
    assert cli._end_of(OSError(code, "reason", "x.json"))[0] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef get_config(:\n", "{file}, line 2: SyntaxError: invalid syntax"),
        (
            "import torchvison\n",
            "{file}, line 1: ModuleNotFoundError: No module named 'torchvison'",
        ),
        (
            "\n\ndef get_config():\n    return 1 / 0\n",
            "{file}, line 4: ZeroDivisionError: division",
        ),
        ("x = 1\n", "{file} has no function get_config()"),
    ],
)
def test_a_broken_file_ends_in_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(SystemExit) as end:
        cli._parse(["main", f"--config={path}"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message.format(file=path)}")
    assert said.count("\n") == 1


def test_an_unknown_field_in_a_file(tmp_path):
    path = written(tmp_path, "config.train.epoch = 3.0")
    with pytest.raises(config_lib.ConfigError, match=r'Did you mean "epochs"') as error:
        config_lib.load(str(path))
    assert str(error.value).startswith(f"{path}, line 6: AttributeError: ")
    assert len(str(error.value)) < 300
    path = written(tmp_path, "config.unlock()", "config.train.epoch = 3.0")
    with pytest.raises(config_lib.ConfigError, match=r"train\.epoch; .* is train\.epochs"):
        config_lib.load(str(path))


@pytest.mark.parametrize("name", list(config_lib.CHOICES))
def test_a_bad_choice_lists_the_allowed_ones(name):
    config = config_lib.default()
    config_lib.validate(config)
    allowed = config_lib.CHOICES[name]
    for value in allowed:
        config.update_from_flattened_dict({name: value})
        config_lib.validate(config)
    bad = 7 if isinstance(allowed[0], int) else "other"
    config.update_from_flattened_dict({name: bad})
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.validate(config)
    listed = ", ".join(repr(value) for value in allowed)
    assert str(error.value) == f"{name}={bad!r}; allowed: {listed}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.batch_size": 0}, r"train\.batch_size=0; allowed: whole numbers in \[1, inf\)$"),
        ({"data.crop_size": -4}, r"data\.crop_size=-4; allowed: whole numbers in \[1, inf\)"),
        ({"data.scale_max": 0.25}, r"data\.scale_max=0\.25 is below data\.scale_min=0\.5"),
        ({"train.epochs": 0.0}, "train.steps and train.epochs are both 0"),
        ({"train.epochs": math.nan}, r"train\.epochs=nan; allowed: numbers in \[0, inf\)"),
        ({"model.dlc_rates": (0, 3)}, r"dlc_rates=\(0, 3\); allowed: whole numbers in \[1, inf\)"),
        ({"model.dlc_rates": (3, 3)}, r"dlc_rates=\(3, 3\); each rate may be there once"),
        ({"model.context_rates": (3, 3)}, r"context_rates=\(3, 3\); each rate"),
        ({"eval.scales": ("a",)}, r"eval\.scales=\('a',\); allowed: numbers in \(0, inf\)"),
        ({"eval.pad_sides": (512, 0.5)}, r"eval\.pad_sides=\(512, 0\.5\); allowed: whole"),
        ({"optimizer.adam_betas": (0.9,)}, r"adam_betas=\(0\.9,\); allowed: two numbers"),
        ({"loss.class_weights": (0.0, 0.0)}, r"class_weights=.*; one of them must be positive"),
        ({"optimizer.multipliers": (3,)}, r"multipliers: 3; allowed: PATH=FACTOR"),
        ({"optimizer.multipliers": ("classifier=nan",)}, r"'classifier=nan'; allowed: PATH=FACTOR"),
        (
            {"model.duc_upsampled": "output", "model.commute_coefficients": False},
            r"model\.duc_upsampled='output' and model\.commute_coefficients=False are both set",
        ),
    ],
)
def test_values_out_of_range(changes, message):
    config = config_lib.default()
    config.update_from_flattened_dict(changes)
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.validate(config)


def test_every_number_has_a_range():
    rows = [name for names in config_lib.RANGES.values() for name in names.split()]
    assert len(rows) == len(set(rows))
    numbers = {name for name, v in config_lib.fields(config_lib.default()) if is_number(v)}
    assert set(rows) == numbers - config_lib.CHOICES.keys() - {"optimizer.multipliers"}


def is_number(value) -> bool:
    return isinstance(value, int | float | tuple) and not isinstance(value, bool)


@pytest.mark.parametrize("allowed", config_lib.RANGES)
def test_a_number_outside_its_range_is_refused(allowed):
    """Below it, above it, NaN and infinite; what lies on a closed end is not."""
    interval, whole = allowed.partition(" in ")[2], allowed.startswith("whole")
    low, high = map(float, interval[1:-1].split(","))
    taken = [end for end, sign in ((low, interval[0]), (high, interval[-1])) if sign in "[]"]
    refused = [low - 1] if low in taken else [low - 1, low]
    if high < math.inf:
        refused += [high + 1] if high in taken else [high, high + 1]
    refused += [] if whole else [math.nan, math.inf]
    config = config_lib.default()
    for name in config_lib.RANGES[allowed].split():
        default = dict(config_lib.fields(config))[name]
        for value in taken:
            config_lib._check_range(name, as_field(value, default, whole), allowed)
        for value in refused:
            bad = as_field(value, default, whole)
            config.update_from_flattened_dict({name: bad})
            with pytest.raises(config_lib.ConfigError) as error:
                config_lib.validate(config)
            assert str(error.value) == f"{name}={bad!r}; allowed: {allowed}"
        config.update_from_flattened_dict({name: default})


def as_field(value: float, default, whole: bool):
    """The number as one of the field's type."""
    number = int(value) if whole else value
    return (number,) if isinstance(default, tuple) else number


@pytest.mark.parametrize("factor", ["1E-3", "5.", ".5", "20"])
def test_a_factor_is_any_number(factor):
    config = config_lib.default()
    config.optimizer.multipliers = (f"classifier={factor}",)
    config_lib.validate(config)


def test_a_batch_that_does_not_divide_shows_the_arithmetic():
    with pytest.raises(config_lib.ConfigError) as error:
        sharding.check_batch(30, 8)
    assert str(error.value) == (
        "train.batch_size=30 does not divide over 8 devices (30 = 3 x 8 + 6); use 24 or 32"
    )
    with pytest.raises(config_lib.ConfigError, match=r"\(3 = 0 x 8 \+ 3\); use 8$"):
        sharding.check_batch(3, 8)
    sharding.check_batch(16, 8)
    sharding.check_batch(1, 1)


def test_training_needs_a_workdir_that_can_be_written(tmp_path):
    train = pytest.importorskip("duc_dlc_jax.train")
    (tmp_path / "file").write_text("")
    with pytest.raises(config_lib.ConfigError, match=r"--workdir=.*/file/run cannot be written"):
        train.train(config_lib.load("configs/demo.py"), tmp_path / "file" / "run")


def test_training_checks_the_batch_before_anything_else(monkeypatch, tmp_path):
    train = pytest.importorskip("duc_dlc_jax.train")
    devices = [Device(i) for i in range(7)]
    monkeypatch.setattr(train.sharding.jax, "devices", lambda: devices)
    config = config_lib.load("configs/demo.py")
    config.data.dir = str(tmp_path)
    with pytest.raises(config_lib.ConfigError, match=r"16 = 2 x 7 \+ 2\); use 14 or 21"):
        train.train(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_an_unknown_file_lists_the_packaged_ones():
    with pytest.raises(config_lib.ConfigError, match=r"configs/nope\.py; .*configs/demo\.py"):
        config_lib.find("configs/nope.py")


def test_packaged_files_are_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert pathlib.Path(config_lib.find("configs/demo.py")).name == "demo.py"
    assert config_lib.load("configs/demo.py").data.name == "scenes"


def test_what_follows_a_colon_goes_to_the_file_and_folders_keep_theirs(tmp_path):
    folder = tmp_path / "12:30"
    folder.mkdir()
    path = written(folder, "config.seed = 3")
    assert config_lib.load(str(path)).seed == 3
    path.write_text(path.read_text().replace("get_config()", "get_config(word)"))
    path.write_text(path.read_text().replace("config.seed = 3", "config.data.name = word"))
    assert config_lib.load(f"{path}:a:b").data.name == "a:b"


def test_missing_data_end_at_once_with_the_folder_and_the_command(tmp_path):
    """As a stranger would meet it: the first command, in an empty folder, without data."""
    command = [sys.executable, "-m", "duc_dlc_jax.main", "--config=configs/cityscapes.py"]
    command += [f"--workdir={tmp_path / 'run'}", f"--config.data.dir={tmp_path / 'data'}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: no prepared records of 'cityscapes' in ")
    assert str(tmp_path / "data" / "cityscapes") in last
    prepare = "python -m duc_dlc_jax.data.prepare --dataset=cityscapes --raw_dir="
    assert prepare in last
    assert last.endswith(f"--data_dir={tmp_path / 'data'}")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


# The configurations that come with the package


def differences(config, other) -> set[str]:
    new, old = dict(config_lib.fields(config)), dict(config_lib.fields(other))
    return {name for name in new if new[name] != old[name]}


@each_config
def test_each_configuration_loads_and_says_how_it_runs(path):
    config = config_lib.load(str(path))
    config_lib.validate(config)
    text = path.read_text()
    docstring = ast.get_docstring(parsed(text))
    module = "ablate" if "get_variants" in text else "main"
    command = rf"python -m duc_dlc_jax\.{module} --config=configs/{path.name}(:\w+)? --workdir="
    assert re.search(rf"Command [\w -]*{command}", " ".join(docstring.split()))
    assert re.search(r"^Hardware  \S", docstring, re.MULTILINE)
    parent = re.search(r'base\.load\("(.+?)"\)', text)
    if parent:
        assert len(differences(config, config_lib.load(parent[1]))) <= 10
    else:
        assert len(differences(config, config_lib.default())) <= 20


@each_config
def test_each_command_starts_from_weights(path):
    """As the paper does; the drawn scenes alone are learned from scratch."""
    config = config_lib.load(str(path))
    given = re.search(r"--config\.init\.weights=(\w+)", ast.get_docstring(parsed(path.read_text())))
    assert given or config.init.weights or config.data.name == "scenes"
    if given and given[1] != "FILE":
        assert given[1] == f"resnet{config.model.depth}"
        assert given[1] in weights.TABLE


@each_config
def test_json_gives_the_same_configuration(path):
    config = config_lib.load(str(path))
    again = config_lib.from_json(config_lib.to_json(config))
    assert list(config_lib.fields(again)) == list(config_lib.fields(config))
    assert again.model.dlc_rates == (3, 6, 12, 18)
    assert again.is_locked


def test_json_of_an_older_version_takes_the_new_defaults():
    config = config_lib.from_json('{"seed": 3, "train": {"steps": 5}}')
    expected = config_lib.default()
    expected.update({"seed": 3, "train": {"steps": 5}})
    assert list(config_lib.fields(config)) == list(config_lib.fields(expected))
    with pytest.raises(config_lib.ConfigError, match=r"train\.stepz; .* train\.steps$"):
        config_lib.from_json('{"train": {"stepz": 5}}')


# No dead fields

# Names that stand for a whole section where it was handed on: (file, name) by section.
HANDED_ON = {
    "data": {
        ("data/pipeline.py", "data"),
        ("data/records.py", "data"),
        ("data/transforms.py", "self"),
        ("data/transforms.py", "config"),
    },
    "model": {
        ("models/segmenter.py", "self"),
        ("models/segmenter.py", "model"),
        ("models/registry.py", "net"),
    },
    "optimizer": {("optimizer.py", "config")},
    "loss": {("losses.py", "settings")},
    "eval": {("protocols.py", "settings")},
}


def sources() -> dict[str, str]:
    package = ROOT / "duc_dlc_jax"
    paths = [p for p in package.rglob("*.py") if p != package / "config.py"]
    return {p.relative_to(package).as_posix(): p.read_text() for p in paths}


def unread_fields(config, texts: dict[str, str]) -> set[str]:
    """Fields that no code reads: neither `<...>.section.field` nor through a section handed on."""
    read = set()
    for file, text in texts.items():
        for node in ast.walk(parsed(text)):
            if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
                continue
            owner = node.value
            if isinstance(owner, ast.Attribute):
                read.add(f"{owner.attr}.{node.attr}")
            elif isinstance(owner, ast.Name):
                if owner.id == "config":
                    read.add(node.attr)
                for section, names in HANDED_ON.items():
                    if (file, owner.id) in names:
                        read.add(f"{section}.{node.attr}")
    return {name for name, _ in config_lib.fields(config)} - read


def test_every_field_is_read():
    assert unread_fields(config_lib.default(), sources()) == set()


@pytest.mark.parametrize("name", ["made_up", "data.made_up", "model.made_up", "loss.momentum"])
def test_a_field_that_nothing_reads_is_found(name):
    """loss.momentum: that another section's field of this name has readers does not help it."""
    config = config_lib.default().unlock()
    section, _, field = name.rpartition(".")
    (config[section] if section else config)[field] = 1
    assert unread_fields(config, sources()) == {name}


@pytest.mark.parametrize("name", ["train.log_every", "optimizer.clip_norm", "data.rotate_degrees"])
def test_a_field_whose_reader_goes_is_found(name):
    field = name.partition(".")[2]
    texts = {file: re.sub(rf"\.{field}\b", ".other", text) for file, text in sources().items()}
    assert unread_fields(config_lib.default(), texts) == {name}


def test_a_field_is_not_read_through_another_section():
    """train.batch_size and eval.batch_size each need their own reader."""
    text = sources()["train.py"]
    for kept, gone in (("train", "eval"), ("eval", "train")):
        one = text.replace(f"config.{gone}.batch_size", f"config.{kept}.batch_size")
        unread = unread_fields(config_lib.default(), {"train.py": one})
        assert f"{gone}.batch_size" in unread
        assert f"{kept}.batch_size" not in unread


def test_deterministic_kernels_are_asked_for_by_a_flag_of_xla(monkeypatch):
    """Beside what was given; nothing without the field."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    cli.use_deterministic_kernels(False)
    assert cli.os.environ["XLA_FLAGS"] == "--xla_dump_to=x"
    cli.use_deterministic_kernels(True)
    assert cli.os.environ["XLA_FLAGS"] == "--xla_dump_to=x --xla_gpu_deterministic_ops=true"


# Ends


FULL_DISK = """
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl"),
    RuntimeError("events.out; No space left on device"),
    errors.CheckpointError("cannot be written"),
"""


def test_a_full_disk_ends_with_its_code_also_where_it_holds_the_log():
    """Each error is raised in a process of its own, whose stderr takes no byte."""
    program = f"""
import errno, os
from duc_dlc_jax import cli, errors

for error in [{FULL_DISK}]:
    if os.fork() == 0:
        def main(argv, error=error):
            raise error
        cli.run(main)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, check=True)
    assert ended.stdout.split() == ["4"] * 3
