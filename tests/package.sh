#!/usr/bin/env bash
# The package as strangers get it: an archive of the sources, installed from twice in one folder, into an environment
# of the lowest versions that the metadata allows, where every part is tried once.
#
#   PYTHON and TORCH name the interpreter and the build of torch (see the Makefile). torch alone is not the lowest
#   allowed: older builds for the CPU are not on PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
stage=$root/build/package
rm -rf "$stage"
mkdir -p "$stage"
"${PYTHON:-python3}" -m venv "$stage/venv"
python=$stage/venv/bin/python
export COVR_CUDA=OFF TRITON_INTERPRET=1
"$python" -m pip install --quiet --upgrade pip
"$python" -m pip install --quiet build "${TORCH:-torch}"

echo "== the source archive"
"$python" -m build --sdist --outdir "$stage" . >"$stage/sdist.log" 2>&1 || { cat "$stage/sdist.log"; exit 1; }
mkdir "$stage/source"
tar -xzf "$stage"/covr_fast-*.tar.gz -C "$stage/source" --strip-components=1

echo "== installed from it, alone, with the lowest versions"
extras=(train sb3 torchrl triton quantize)
"$python" tests/lowest.py "${extras[@]}" >"$stage/lowest.txt"
"$python" tests/lowest.py --build >"$stage/lowest-build.txt"
cat "$stage/lowest.txt" "$stage/lowest-build.txt"
"$python" -m pip install --quiet -c "$stage/lowest.txt" --build-constraint "$stage/lowest-build.txt" "$stage/source"
mkdir "$stage/elsewhere"
cd "$stage/elsewhere"
"$python" -c 'from covr_fast import ReplayBuffer, ops
print(ReplayBuffer(8, num_envs=1, obs_shape=(3,), action_shape=(1,)), ops)'

echo "== again in the same folder, with the newest build tools, and with the extras"
all=$(IFS=,; echo "${extras[*]}")
"$python" -m pip install --quiet -c "$stage/lowest.txt" "$stage/source[$all]"
"$python" -m pip check
"$python" -m pip install --quiet --dry-run "covr-fast[flash]"

echo "== every part once"
"$python" "$root/tests/smoke.py"
