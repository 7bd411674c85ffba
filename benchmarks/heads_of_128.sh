#!/usr/bin/env bash
# Makes the rows of heads of 72 and 128, of wide blocks and of a million tokens on the GPU at hand, a file each:
#
#     benchmarks/heads_of_128.sh [FOLDER] [NAME...]
#
# Each file is one process, in which all is timed in turns: our specs, cuDNN, and FlexAttention for wide blocks. Kernels
# are compiled before, of all files at once: one process compiles on one core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} folder=${1:-benchmarks} spec=benchmarks/spec
names=("${@:2}")
[ "${#names[@]}" -gt 0 ] || names=(heads_of_72 video_32760 video_75600 video_115200 wide_blocks million eager_4096)
cudnn=(--dense sdpa-cudnn --in-turns)
graphs=("${cudnn[@]}" --mode graph --repeats 10)

arguments() { # of a file's bench, one a line
    case $1 in
    heads_of_72) printf '%s\n' $spec/llsa_l2_d72.yaml llsa_l2 -n 65536 --heads 16 "${graphs[@]}" ;;
    video_32760) printf '%s\n' llsa_video -n 32760 --heads 12 "${graphs[@]}" ;;
    video_75600) printf '%s\n' llsa_video $spec/b64_l2.yaml -n 75600 --heads 12 "${graphs[@]}" ;;
    video_115200) printf '%s\n' llsa_video -n 115200 --heads 24 "${graphs[@]}" ;;
    wide_blocks)
        printf '%s\n' $spec/b128_k32.yaml vsa_like $spec/b64_k171.yaml -n 109632 --heads 12 "${graphs[@]}" \
            --along benchmarks.flex:attend
        ;;
    million)
        printf '%s\n' llsa_l3 $spec/llsa_l4.yaml -n 262144 -n 1048576 --heads 8 --in-turns --mode eager --mode graph \
            --repeats 10 --dense-up-to 1
        ;;
    eager_4096) printf '%s\n' llsa_l2 -n 4096 --batch 2 --heads 4 --mode eager --repeats 100 "${cudnn[@]}" ;;
    *)
        printf '%s: expected one of heads_of_72, video_32760, video_75600, video_115200, wide_blocks, million, ' "$0" >&2
        printf 'eager_4096, got %s\n' "$1" >&2
        return 1
        ;;
    esac
}

bench() { # a name, and what to add
    local given
    mapfile -t given < <(arguments "$1")
    "$python" -m llsa_gen bench --batch 1 "${given[@]}" "${@:2}"
}

for name in "${names[@]}"; do arguments "$name" > /dev/null; done
for name in "${names[@]}"; do
    bench "$name" --repeats 1 --no-breakdown --dense-up-to 1 > /dev/null 2>&1 &
done
wait
for name in "${names[@]}"; do bench "$name" --json "$folder/$name.json"; done
