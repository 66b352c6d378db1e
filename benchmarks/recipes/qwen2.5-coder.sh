#!/usr/bin/env bash
# Makes and measures an artifact of Qwen2.5-Coder-Instruct: `DATA=folder benchmarks/recipes/qwen2.5-coder.sh 1.5b` (or 0.5b).
# DATA is the folder of recipes/smollm2.sh, and minilongbench_part.jsonl (rows of MiniLongBench with their whole prompts) and
# squad_v2_dev_part.json (SQuAD 2.0). Text and held-out documents are those of that recipe, too. A killed calibration goes on
# when the script is run again; the measurements then begin anew.
# GPU=1: calibrate and write answers on a GPU, as the shipped artifacts were made. Without one, the default recipe (300 steps
# of 1,024 tokens) gives the earlier artifacts, and the answers of the 1.5B take long. The shipped ones were distilled before
# predictors learned from the student itself (docs/log.md, 2026-11-27): this makes others.
set -euo pipefail
: "${DATA:?set DATA to the folder with the text files}"
SIZE=${1:?give the size, 0.5b or 1.5b}
NAME=qwen2.5-coder-$SIZE
MODEL=$(python benchmarks/models.py "$NAME")
OUT=${OUT:-artifacts/$NAME-instruct}
RESULTS=benchmarks/results/$NAME
PROSE=("$DATA/longbench_multi_news_part.jsonl[:20]" "$DATA/us_presidential_speeches.jsonl[100:]")
STDLIB=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
CODE=()
for module in pickle random shutil subprocess tarfile threading typing zipfile; do CODE+=("$STDLIB/$module.py[:1]"); done

case $SIZE in 1.5b) STEPS=1100 ;; *) STEPS=850 ;; esac
LONGER=() ANSWERS=(--batch 8)
if [ -n "${GPU:-}" ]; then
  ANSWERS=(--device cuda --dtype bf16 --batch 12)
  LONGER=(--device cuda --dtype bf16 --sequence-length 2048 --steps $STEPS)
fi

fastfill calibrate "$MODEL" "${LONGER[@]}" --resume --out "$OUT" --data "$DATA/longbench_multi_news_part.jsonl[20:]" \
  "$DATA/us_presidential_speeches.jsonl[:100]" "$DATA/wikitext2_valid.txt[:60]" "$STDLIB"/[a-c]*.py
mkdir -p "$RESULTS"
evaluate() { fastfill evaluate "$MODEL" --artifact "$OUT" --json "$@" | tail -n 1; }
{
  evaluate --data "${PROSE[@]}" --limit 8 --record
  evaluate --data "${CODE[@]}" --limit 8
  evaluate --data "${PROSE[@]}" --limit 8 --weights int8
} >"$RESULTS/quality.jsonl.part"
mv "$RESULTS/quality.jsonl.part" "$RESULTS/quality.jsonl"
LONGBENCH=(--task longbench --data "$DATA/minilongbench_part.jsonl" --max-prompt-tokens 2048)
if [ "$SIZE" = 1.5b ]; then
  evaluate "${LONGBENCH[@]}" --score both "${ANSWERS[@]}" >"$RESULTS/longbench.json"
  TASKS=$(mktemp -d)
  python benchmarks/make_tasks.py --squad "$DATA/squad_v2_dev_part.json" --out "$TASKS" --rows 100 --characters 5500-13000
  evaluate --task suite --data "$TASKS" --lengths 1024-4096 --max-prompt-tokens 4000 --limit 100 --score both "${ANSWERS[@]}" \
    >"$RESULTS/suite.json"
  {  # upper layers that read half of the prompt, beside those that read it all
    for weights in model int8; do
      fastfill bench "$MODEL" --artifact "$OUT" --prompt-lengths 1024,2048 --repeats 3 --upper-share 0.5 --weights $weights --json | tail -n 1
    done
    for share in 0.5 1; do
      evaluate --task suite --data "$TASKS" --lengths 1024-2048 --max-prompt-tokens 2048 --limit 3 --score likelihood --upper-share $share
    done
  } >"$RESULTS/upper.jsonl"
  rm -r "$TASKS"
else
  evaluate "${LONGBENCH[@]}" --score likelihood >"$RESULTS/longbench.json"
  TASKS=$(mktemp -d)
  python benchmarks/make_tasks.py --squad "$DATA/squad_v2_dev_part.json" --out "$TASKS" --rows 100 --characters 5500-13000
  evaluate --task suite --data "$TASKS" --lengths 1024-2048 --max-prompt-tokens 2048 --limit 27 --score both "${ANSWERS[@]}" \
    >"$RESULTS/suite.json"
  rm -r "$TASKS"
fi
fastfill bench "$MODEL" --artifact "$OUT" --prompt-lengths 512,1024,2048 --repeats 3 --json | tail -n 1 >"$RESULTS/bench-native.json"
fastfill bench "$MODEL" --artifact "$OUT" --prompt-lengths 1024 --repeats 3 --packed --json | tail -n 1 >"$RESULTS/bench-packed.json"
# Beside the other engines that are installed.
fastfill bench "$MODEL" --artifact "$OUT" --prompt-lengths 1024 --repeats 3 --weights int8 --compare --json | tail -n 1 >"$RESULTS/bench-int8.json"
{
  bench() { fastfill bench "$MODEL" --artifact "$OUT" --json "$@" | tail -n 1; }
  for sparsity in 0.3 0.7; do
    bench --sparsity $sparsity --prompt-lengths 1024,2048 --repeats 2
    evaluate --data "${PROSE[@]}" --limit 8 --sparsity $sparsity
  done
  bench --prompt-lengths 4096 --repeats 1
  bench --prompt-lengths 8192,16384 --repeats 1
} >"$RESULTS/levels.jsonl"
# Other number formats of the same file, where llama.cpp's programs are on PATH: its own time, and what they cost the artifact.
if command -v llama-quantize llama-bench >/dev/null; then
  rm -f "$RESULTS/llama-bench.jsonl" "$RESULTS/formats.jsonl"
  for format in Q8_0 Q4_0; do
    file=${MODEL%/*}/$NAME-instruct-$format.gguf
    test -f "$file" || llama-quantize --allow-requantize "$MODEL" "$file" $format
    fastfill evaluate "$file" --artifact "$OUT" --json --data "${PROSE[@]}" --limit 8 | tail -n 1 >>"$RESULTS/formats.jsonl"
  done
  fastfill evaluate "${MODEL%/*}/$NAME-instruct-Q8_0.gguf" --artifact "$OUT" --json --data "${PROSE[@]}" --limit 8 --weights int8 |
    tail -n 1 >>"$RESULTS/formats.jsonl"
  for file in "${MODEL%/*}/$NAME"-instruct-*.gguf; do
    llama-bench -m "$file" -p 1024 -n 0 -t "$(nproc)" -r 3 -o jsonl >>"$RESULTS/llama-bench.jsonl"
  done
fi
python benchmarks/report_tables.py
