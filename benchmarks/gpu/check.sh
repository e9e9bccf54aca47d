#!/usr/bin/env bash
# Everything that has to be measured on a GPU, in one command; what it does and writes stands in check.py.
#
#   benchmarks/gpu/check.sh [operator|training|all] [--out DIR] [--wheelhouse DIR] [--shards DIR] [--peers DIR]
#                           [--small] [--only STEP,...]
#
# A wheelhouse (default: ./wheelhouse where there is one; `make wheelhouse`) is installed into a temporary folder, so
# that a machine without a network and without this project's dependencies can run the check. PYTHON: the interpreter.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
PYTHON=${PYTHON:-python3}
wheelhouse=
previous=
for argument in "$@"; do
  if [ "$previous" = --wheelhouse ]; then wheelhouse=$argument; fi
  case $argument in --wheelhouse=*) wheelhouse=${argument#--wheelhouse=} ;; esac
  previous=$argument
done
if [ -z "$wheelhouse" ] && [ -d wheelhouse ]; then
  wheelhouse=$PWD/wheelhouse
  set -- "$@" --wheelhouse "$wheelhouse"
fi
if [ -n "$wheelhouse" ]; then
  site=$(mktemp -d) || exit 1
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --upgrade --target "$site" \
    "$wheelhouse"/*.whl || echo "the wheelhouse $wheelhouse could not be installed: steps that need it will say so" >&2
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$PYTHON" benchmarks/gpu/check.py "$@"
