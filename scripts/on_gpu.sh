#!/usr/bin/env bash
# Everything that a machine with a GPU can tell of this project, in one call of at most 9 minutes, without a network:
#     scripts/on_gpu.sh FOLDER [--seconds 540] [--dry-run]
# Another Python than python3: PYTHON=/path/to/python scripts/on_gpu.sh ... What it does: scripts/on_gpu.py.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/on_gpu.py" "$@"
