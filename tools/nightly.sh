#!/usr/bin/env bash
# The fault-injection suite with all its counts (about half an hour on two cores), and the page that says what came of it.
# Usage: tools/nightly.sh [PYTEST ARGUMENTS]
. "$(dirname "$0")/setup.sh" test
tally=$(mktemp)
trap 'rm -f "$tally"' EXIT
CBQSTREAM_NIGHTLY=1 CBQSTREAM_FAULT_TALLY=$tally "$venv/bin/python" -m pytest tests/faults "$@"
"$venv/bin/python" tests/faults/page.py "$tally" tests/faults/README.md
