#!/usr/bin/env bash
# All that needs a GPU: the tests on CUDA and every benchmark, on a machine without a network.
#
#   benchmarks/gpu.sh [--device cuda] [--out FOLDER] [--wheels FOLDER] [--seconds 570]
#                     [--only "PART ..."] [--toy]
#
# Wants Python 3.12 with torch 2.11, torchvision, and pytest, hypothesis, numpy, scipy, pillow,
# scikit-learn, matplotlib, accelerate, einops and tqdm. What else there is to bring along comes
# from a machine with a network:
#
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
#       --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
#       --platform manylinux2014_x86_64 -r benchmarks/gpu-wheels.txt -d runs/wheels
#
# A part whose file of results lies in --out is done, and left out. One that would not end within
# --seconds of the call's start is left for the next call: two of ten minutes are to be enough.
# Exit status: 0 all is done, 75 something is left for another call, 1 something failed; its log
# lies in --out. --toy proves the script on a processor, with --device cpu; its times say nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=cuda out=runs/gpu wheels=runs/wheels seconds=570 toy=
only="tests transfers overhead steps features combination refuge_step compiled"
while (($#)); do
    case $1 in
    --toy) toy=1 && shift && continue ;;
    --device) device=$2 ;;
    --out) out=$2 ;;
    --wheels) wheels=$2 ;;
    --seconds) seconds=$2 ;;
    --only) only=$2 ;;
    *) echo "unknown: $1" >&2 && exit 2 ;;
    esac
    shift 2
done
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" \
        "$wheels"/*.whl || exit 1
    PYTHONPATH=$PYTHONPATH:$work/site
fi
status=0

# part NAME SECONDS FOLDER PREFIX COMMAND...: runs it, if PREFIX_*.md is not in FOLDER and the
# seconds that it may take are left.
part() {
    local name=$1 takes=$2 folder=$3 prefix=$4 left=$((seconds - SECONDS)) code=0
    shift 4
    if [[ " $only " != *" $name "* ]]; then return; fi
    if compgen -G "$folder/${prefix}_*.md" >/dev/null; then
        echo "$name: done before"
    elif ((left < takes)); then
        echo "$name: left for another call, $left s are too few"
        if ((status == 0)); then status=75; fi
    else
        timeout --kill-after 5 "$left" "$@" >"$work/log" 2>&1 || code=$?
        if ((code == 0)); then
            rm -f "$out/$name.log"
            echo "$name: done at $SECONDS s"
        elif ((code == 124 || code == 137)); then
            echo "$name: stopped at the end of the time, to be begun again"
            if ((status == 0)); then status=75; fi
        else
            cp "$work/log" "$out/$name.log"
            tail -n 20 "$work/log"
            echo "$name: failed, exit status $code, see $out/$name.log"
            status=1
        fi
    fi
}

# bench NAME SECONDS PROGRAM OPTIONS...: a part that is a benchmark.
bench() {
    local name=$1 takes=$2 program=$3 folder=$out
    shift 3
    if [[ $name == compiled ]]; then folder=$out/compiled; fi
    if [[ $toy ]]; then takes=1; fi
    part "$name" "$takes" "$folder" "$program" \
        "$python" -m "benchmarks.$program" --device "$device" --out "$folder" "$@" "${small[@]}"
}

cuda_tests() {
    local file=$out/tests_$device.md
    "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py 2>&1 | tee "$work/tests"
    if ((PIPESTATUS[0])); then return 1; fi
    {
        echo "# Tests on $device"
        echo
        "$python" -c "import torch; print('torch', torch.__version__, end=', ')"
        "$python" -c "import torch; print(*map(torch.cuda.get_device_name, range(torch.cuda.device_count())), end='.\n')"
        printf '\n```\n%s\n```\n' "$(cat "$work/tests")"
    } >"$file"
}
export -f cuda_tests
export out device python work

small=()
part tests "$([[ $toy ]] && echo 1 || echo 180)" "$out" tests bash -c cuda_tests

once=(--processes 1 --repetitions 1)
if [[ $toy ]]; then small=("${once[@]}" --width 4 --size 32); fi
bench transfers 60 transfers
if [[ $toy ]]; then small=("${once[@]}"); fi
bench overhead 60 overhead --processes 3
if [[ $toy ]]; then small=("${once[@]}" --width 8 --size 32 --batch-size 1 --memory joint); fi
bench steps 120 steps --processes 2 --size 256 --batch-size 8
if [[ $toy ]]; then small=("${once[@]}" --tasks 2 --size 32 --batch-size 2 --width 4); fi
bench features 180 features --processes 2 --tasks 4 40 --size 128 --batch-size 16 --width 64
if [[ $toy ]]; then small=("${once[@]}" --tasks 2); fi
bench combination 140 combination --processes 2
if [[ $toy ]]; then
    small=("${once[@]}" --width 4 --size 32 --batch-size 2 --original 64 --methods joint)
fi
bench refuge_step 210 refuge_step --processes 1 --width 64 --size 256 --batch-size 8 \
    --ways float32 tf32 fast --eager
if [[ $toy ]]; then small+=(--eager); fi
bench compiled 180 refuge_step --processes 1 --width 64 --size 256 --batch-size 8 \
    --methods joint independent --ways decoded fast
exit "$status"
