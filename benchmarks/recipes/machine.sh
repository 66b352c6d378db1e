#!/usr/bin/env bash
# The speed of Qwen2.5-Coder-Instruct on another processor than the first tables': `benchmarks/recipes/machine.sh avx2 1.5b` (or
# amx, 0.5b). Beside it llama.cpp, where its programs are on PATH, and what tokens that are read again cost and gain: DATA as for
# qwen2.5-coder.sh.
set -euo pipefail
: "${DATA:?set DATA to the folder with the text files}"
MACHINE=${1:?name the folder of the results, avx2 or amx}
case $MACHINE in avx2 | amx) ;; *) echo "no results are kept in $MACHINE: avx2 or amx" >&2; exit 2 ;; esac
SIZE=${2:?give the size, 0.5b or 1.5b}
NAME=qwen2.5-coder-$SIZE
MODEL=$(python benchmarks/models.py "$NAME")
RESULTS=benchmarks/results/$MACHINE/$NAME
mkdir -p "$RESULTS"
bench() { fastfill bench "$MODEL" --artifact "$NAME" --repeats 2 --json "$@" | tail -n 1; }

bench --prompt-lengths 512,1024,2048 >"$RESULTS/bench-native.json"
bench --prompt-lengths 1024 --weights int8 >"$RESULTS/bench-int8.json"
bench --prompt-lengths 1024 --packed >"$RESULTS/bench-packed.json"
PROSE=("$DATA/longbench_multi_news_part.jsonl[:20]" "$DATA/us_presidential_speeches.jsonl[100:]")
TASKS=$(mktemp -d)
python benchmarks/make_tasks.py --squad "$DATA/squad_v2_dev_part.json" --out "$TASKS" --rows 100 --characters 5500-13000
evaluate() { fastfill evaluate "$MODEL" --artifact "$NAME" --json "$@" | tail -n 1; }
{
  bench --prompt-lengths 1024,2048 --reread 0.1
  evaluate --data "${PROSE[@]}" --limit 8 --reread 0.1
  if [ "$SIZE" = 0.5b ]; then  # of the 1.5B it would take hours
    for share in 0.1 0; do
      evaluate --task suite --data "$TASKS" --lengths 1024-2048 --max-prompt-tokens 2048 --limit 2 --score likelihood --reread $share
    done
  fi
} >"$RESULTS/reread.jsonl"
rm -r "$TASKS"
if command -v llama-quantize llama-bench >/dev/null; then
  rm -f "$RESULTS/llama-bench.jsonl"
  for format in Q8_0 Q4_0; do
    file=${MODEL%/*}/$NAME-instruct-$format.gguf
    test -f "$file" || llama-quantize --allow-requantize "$MODEL" "$file" $format
  done
  for file in "${MODEL%/*}/$NAME"-instruct-*.gguf; do
    llama-bench -m "$file" -p 1024 -n 0 -t "$(nproc)" -r 3 -o jsonl >>"$RESULTS/llama-bench.jsonl"
  done
fi
python benchmarks/report_tables.py
