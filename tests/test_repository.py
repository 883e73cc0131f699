"""The repository itself: what it declares, documents, packs and must not contain."""

from __future__ import annotations

import ast
import codecs
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import duc_dlc_jax
from repository import ROOT, parsed, tracked_files, tracked_texts

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
REQUIRED = PROJECT["project"]["dependencies"]

# Turned by 13 letters, so that this file does not contain what it forbids.
REGISTRIES = codecs.decode(
    "clcv.bet clgubaubfgrq.bet qbjaybnq.clgbepu.bet aczwf.bet aczwf.pbz "
    "nanpbaqn.bet pbaqn.vb qbpxre.vb tupe.vb",
    "rot13",
).split()
MACHINE_PATHS = re.compile(r"(?<![\w.$}*-])/(?:work|root|opt|home|Users)/")
IMPORT_NAMES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "cv2": "opencv-python-headless",
    "orbax": "orbax-checkpoint",
}
EXTRAS_BY_FILE = {
    "duc_dlc_jax/storage.py": "cloud",
    "duc_dlc_jax/ablate/plots.py": "plots",
    "duc_dlc_jax/benchmark/plots.py": "plots",
}  # modules that only an extra can run


def canonical(requirement: str) -> str:
    """`Ml_Collections>=1.0; marker` -> `ml-collections`."""
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def test_extras_exist():
    assert sorted(EXTRAS) == ["cloud", "cuda", "dev", "export", "plots", "torch", "tpu"]


def test_python_range_is_that_of_the_workflow():
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.search(r"python: \[(.*?)\]", workflow).group(1) == '"3.11", "3.12", "3.13"'


def test_every_dependency_has_a_reason_in_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    reasons = re.findall(r"^\| ([\w-]+) \| \S[^|]* \|$", text, re.MULTILINE)
    missing = {canonical(d) for d in REQUIRED} - {canonical(name) for name in reasons}
    assert not missing, f"no line in CONTRIBUTING.md's table of dependencies: {missing}"
    rows = set(re.findall(r"^\| (\w+) \| ([\w-]+)(?:\[\w+\])? \| \S.* \|$", text, re.MULTILINE))
    declared = {(extra, canonical(d)) for extra, listed in EXTRAS.items() for d in listed}
    assert declared == {row for row in rows if row[0] in EXTRAS}


def test_every_import_is_declared():
    required = {canonical(d) for d in REQUIRED}
    optional = {canonical(d) for d in EXTRAS["export"]}  # imported where they are needed, late
    for path in sorted((ROOT / "duc_dlc_jax").rglob("*.py")):
        extra = EXTRAS_BY_FILE.get(path.relative_to(ROOT).as_posix())
        declared = required | {canonical(d) for d in EXTRAS.get(extra, ())}
        for node in ast.walk(parsed(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            for top in {module.partition(".")[0] for module in modules}:
                if top in sys.stdlib_module_names or top == "duc_dlc_jax":
                    continue
                name = IMPORT_NAMES.get(top, canonical(top))
                where = f"{path}:{node.lineno}"
                late = node.col_offset > 0 and name in optional
                assert name in declared or late, f"{where} imports {top}, an undeclared package"


def test_every_dependency_is_constrained_on_every_python():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins: dict[str, list[str]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==([\w.]+)(?:; (python_version .*))?", line)
            assert match, f"constraints.txt: {line!r} is not NAME==VERSION[; python_version ...]"
            pins.setdefault(canonical(match[1]), []).append(match[3] or "every")
    both = ['python_version == "3.11"', 'python_version >= "3.12"']
    for name, markers in pins.items():
        assert sorted(markers) in (["every"], both), f"constraints.txt: {name} has {markers}"
    everything = [*REQUIRED, *(d for listed in EXTRAS.values() for d in listed)]
    elsewhere = {"tensorflow"}  # where tensorflow-cpu has no build; not covered here
    assert {canonical(d) for d in everything} - elsewhere <= set(pins)


def test_configs_are_in_the_wheel():
    include = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert include == {"configs": "duc_dlc_jax/configs"}
    assert (ROOT / "configs" / "demo.py").is_file()


def test_git_ignores_no_file_of_the_package():
    # hatchling leaves ignored files out of the wheel
    assert ROOT / "duc_dlc_jax" / "data" / "labels.json" in tracked_files()


def test_version():
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "duc_dlc_jax/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", duc_dlc_jax.__version__)
    assert f"\nversion: {duc_dlc_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, duc_dlc_jax; print({'jax', 'numpy', 'tensorflow'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_no_registry_hosts():
    """Nor those of packages beside the weights that PyTorch publishes at the same host."""
    weights = "/".join(["https:/", REGISTRIES[2], "models", ""])
    table = pathlib.Path("duc_dlc_jax", "models", "weights.py")
    found = []
    for path, text in tracked_texts():
        allowed = text.replace(weights, "") if path == table else text
        found += [f"{path}: {host}" for host in REGISTRIES if host in allowed]
    assert not found
    assert weights in (ROOT / table).read_text()


def test_no_machine_paths():
    found = [
        f"{path}:{number}: {line.strip()}"
        for path, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATHS.search(line) and path.name != pathlib.Path(__file__).name
    ]
    assert not found, "\n".join(found)


def anchors(text):
    """Of a document's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in plain}


def test_markdown_links_lead_somewhere():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    links = 0
    for path in documents:
        for target, _, anchor in re.findall(r"\]\(([^)#:]*)(#([^)]+))?\)", path.read_text()):
            file = (path.parent / target) if target else path
            assert file.exists(), f"{path} links to {target}, which does not exist"
            links += bool(anchor)
            if anchor:
                assert anchor in anchors(file.read_text()), f"{path}: {target}#{anchor}"
    assert links > 20


def test_code_of_the_documents_holds():
    """What Python in them imports is there, and so are the lines that a diff finds or removes."""
    sources = {p: p.read_text() for p in (ROOT / "duc_dlc_jax").rglob("*.py")}
    lines = {line for text in sources.values() for line in text.splitlines()}
    imports = diffs = 0
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        blocks = re.findall(r"^```(python|diff)\n(.*?)^```", path.read_text(), re.M | re.S)
        for code in (code for kind, code in blocks if kind == "diff"):
            kept = [line[1:] for line in code.splitlines() if line[0] != "+"]
            assert set(kept) <= lines, f"{path.name}: {set(kept) - lines}"
            diffs += len(kept)
        trees = [ast.parse(code) for kind, code in blocks if kind == "python"]
        for node in (node for tree in trees for node in ast.walk(tree)):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("duc_dlc_"):
                continue
            module = ROOT.joinpath(*str(node.module).split("."))
            own = sources.get(module.with_suffix(".py"), "")
            for name in (alias.name for alias in node.names):
                defined = re.search(rf"^(def |class )?{name}\b", own, re.M)
                assert defined or module / f"{name}.py" in sources, f"{path.name}: {name}"
                imports += 1
    assert imports > 10
    assert diffs > 3


def test_every_module_has_its_place_in_the_table_of_contributing():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| place |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(?:duc_dlc_jax/)?([\w.]+/?)", table))
    package = [p for p in (ROOT / "duc_dlc_jax").iterdir() if p.name[0] not in "_."]
    missing = {p.name for p in package if p.name not in named and f"{p.name}/" not in named}
    assert not missing


def documented_commands() -> list[tuple[str, str, list[str]]]:
    """(document, module, words) of each command of this package that a document shows."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(r"^\$ (.*python -m duc_dlc_jax.*)$", text, re.MULTILINE):
            words = shlex.split(line.replace("[", " ").replace("]", " "), comments=True)
            module = words[words.index("-m") + 1]
            found.append((f"{path.name}: {line}", module, words))
    return found


def defined_flags(module: str) -> dict[str, str]:
    """The arguments of each flag that a command defines, by name, as they are written."""
    path = ROOT.joinpath(*module.split("."))
    own = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    shared = [ROOT / "duc_dlc_jax" / name for name in ("cli.py", "distributed.py")]
    text = "".join(file.read_text() for file in (own, *shared))
    return dict(re.findall(r"(?:DEFINE|define)_\w+\(\s*\"(\w+)\",?((?:[^()]|\([^()]*\))*)\)", text))


def test_documented_commands_have_flags_that_exist_in_an_order_that_holds():
    """A field of the configuration has to follow the file that it changes."""
    commands = documented_commands()
    assert len(commands) > 70
    for where, module, words in commands:
        names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
        unknown = {name.partition(".")[0] for name in names} - set(defined_flags(module))
        assert not unknown, f"{where}: no such flags: {unknown}"
        if "config" in names:
            early = [name for name in names[: names.index("config")] if "." in name]
            assert not early, f"{where}: before --config"


def test_seeds_are_never_negative():
    found = [defined_flags(f"duc_dlc_jax.{name}").get("seed") for name in ("fit", "data.show")]
    assert all(seed and "lower_bound=0" in seed for seed in found), found


def test_make_targets_of_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert {"install", "demo", "test", "test-all", "lint", "bench", "help"} <= targets
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run"]
    documents.append(ROOT / ".github" / "workflows" / "ci.yml")
    for path in documents:
        for line in re.findall(r"\bmake ((?:[a-z][a-z-]* ?)+)", path.read_text()):
            named = {word for word in line.split() if word in targets or "-" in word}
            assert named <= targets, f"{path.name}: make {line}; targets: {sorted(targets)}"


def test_the_rows_of_conversion_do_not_hide_a_failure():
    command = ["make", "--silent", "--old-file=install", "conversion", "EXTRAS="]
    for code, said in ((0, 0), (3, 2)):
        words = [*command, f"PYTEST=sh -c 'echo other; echo \"| row\"; exit {code}'"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert (done.stdout, done.returncode) == ("| row\n", said), done.stderr


def test_make_does_not_install_into_the_environment_of_another_python(tmp_path):
    """The interpreters are scripts; without PYTHON= the environment's own is taken."""
    scripts = {
        tmp_path / "venv" / "bin" / "python": f'[ "$1" = -c ] && exec {sys.executable} "$@"',
        tmp_path / "other": "echo 3.9",
    }
    for path, text in scripts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    command = ["make", "-C", str(ROOT), "install", f"VENV={tmp_path / 'venv'}", "EXTRAS=dev"]
    given = ("PYTHON", "MAKEFLAGS")  # by a `make test` around this
    environ = {name: value for name, value in os.environ.items() if name not in given}

    def ended(*words):
        run = [*command, *words]
        return subprocess.run(run, env=environ, capture_output=True, text=True)

    refused = ended(f"PYTHON={tmp_path / 'other'}")
    assert re.search(r"venv is Python 3\.1\d, .*other is 3\.9: make VENV=", refused.stderr)
    assert "pip install" not in refused.stdout
    assert "pip install" in ended().stdout  # where the script ends it


def test_every_marker_has_a_target_and_is_out_of_the_fast_suite():
    makefile = (ROOT / "Makefile").read_text()
    markers = [m.partition(":")[0] for m in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    left_out = re.search(r"^MARKS := (.*)$", makefile, re.MULTILINE).group(1).split()
    assert sorted(left_out) == sorted(markers)
    fast = re.search(r"^test:.*\n\t(.*)$", makefile, re.MULTILINE).group(1)
    assert '-m "not ($(subst $(space), or ,$(MARKS)))"' in fast
    for marker in markers:
        target = rf"^\t\$\(PYTEST\) -m {marker}( \$\((PYTEST_ARGS|TWO_AT_ONCE)\))?$"
        assert re.search(target, makefile, re.MULTILINE), f"no target runs -m {marker}"
