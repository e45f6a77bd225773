#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine without a network: builds for the local architecture, then
# `python -m bench device` tests, sanitizes and times. Options go to that command (--help); PYTHON names
# the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '.'); then
  case "$capability" in
    90 | 100) arch=${capability}a-real ;; # the architecture-specific instructions
    *) arch=${capability}-real ;;
  esac
  export HULUKERN_CMAKE_ARGS="-DHULUKERN_CUDA=ON -DHULUKERN_CUDA_ARCHS=$arch ${HULUKERN_CMAKE_ARGS:-}"
fi
"$PYTHON" setup.py --quiet build_ext --inplace
exec "$PYTHON" -m bench device "$@"
