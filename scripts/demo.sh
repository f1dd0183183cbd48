#!/usr/bin/env bash
# The main job on real input: sets itself up, then runs `dare-agg demo` with the given options.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec dare-agg demo "$@"
