#!/usr/bin/env bash
# Runs packages/*/tests/gpu, or those of the packages named, with plain pytest: no nox, no network.
#
#   scripts/gpu_tests.sh [PACKAGE…] [-- PYTEST ARGUMENT…]      e.g. scripts/gpu_tests.sh ring-core -- -k gather -x
#
# Tests that need more GPUs than there are skip themselves; with RING_TEST_SHARE_GPUS=1 their ranks share what there is.
# Packages may be installed, or be found through PYTHONPATH.
# PYTHON names the interpreter (default: python3). Exit code: 0 if every package's tests passed, 1 if some failed or none
# ran (a package all of whose tests are skipped counts as not run), 2 for wrong usage.
set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}

packages=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    packages+=("$1")
    shift
done
[ $# -gt 0 ] && shift
if [ ${#packages[@]} -eq 0 ]; then
    for folder in packages/*/tests/gpu; do
        [ -d "$folder" ] || continue
        package=${folder#packages/}
        packages+=("${package%/tests/gpu}")
    done
fi
for package in "${packages[@]}"; do
    if [ ! -d "packages/$package/tests/gpu" ]; then
        echo "gpu_tests.sh: there is no packages/$package/tests/gpu" >&2
        exit 2
    fi
done

"$python" - <<'PYTHON' || exit 1
import sys
import torch
count = torch.cuda.device_count()
names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, {count} GPUs: {', '.join(names) or 'none'}", flush=True)
PYTHON

summary=()
status=0
for package in "${packages[@]}"; do
    log=$(mktemp)
    start=$SECONDS
    # One process per package: its tests never lean on what another's have imported. No cache: the tree may be read-only.
    "$python" -m pytest "packages/$package/tests/gpu" -p no:cacheprovider "$@" 2>&1 | tee "$log"
    code=${PIPESTATUS[0]}
    last=$(grep -E '[0-9]+ (passed|failed|skipped|error|errors|deselected)' "$log" | tail -n 1 | tr -d '=')
    rm -f "$log"
    verdict=passed
    if [ "$code" -ne 0 ]; then
        verdict=FAILED
        [ "$code" -eq 5 ] && verdict="NOTHING RAN"
        status=1
    elif ! grep -qE '[0-9]+ passed' <<<"$last"; then
        verdict="NOTHING RAN"
        status=1
    fi
    summary+=("$(printf '%-14s %-12s %4d s  %s' "$package" "$verdict" $((SECONDS - start)) "${last:-pytest ended with $code}")")
done

echo
echo "GPU tests by package:"
printf '  %s\n' "${summary[@]}"
exit $status
