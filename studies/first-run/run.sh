#!/usr/bin/env bash
# Train, evaluate, write: every figure of README.md beside this. WIKITEXT: wikitext-2-raw test.
set -euo pipefail
: "${WIKITEXT:?path of the WikiText-2 raw test file}"
out=${RESULTS:-studies/first-run/results}
run=runs/first-run
mkdir -p "$out"
attamba train studies/first-run/config.yaml "$@"
cp $run/metrics.jsonl $run/config.json "$out"/
attamba eval $run --batch-size 32 --json "$out/books.json" | tee "$out/eval.txt"
attamba eval $run --data "$WIKITEXT" --split-on '^ = [^=].* = $' --batch-size 32 \
  --json "$out/wikitext2.json" | tee -a "$out/eval.txt"
attamba eval $run --sweep chunk_size=1,2,4,8,16,32 --max-tokens 200000 --batch-size 32 \
  --json "$out/chunk-size.json" | tee -a "$out/eval.txt"
attamba eval $run --sweep leading_tokens=0,8,64,256 --max-tokens 200000 --batch-size 32 \
  --json "$out/leading-tokens.json" | tee -a "$out/eval.txt"
for prompt in "It was a dark and stormy night" "The captain looked at the sea, and said"; do
  attamba generate $run --prompt "$prompt" --max-new-tokens 150 --temperature 0.8 --top-p 0.95 \
    --seed 0 2>&1 | tee -a "$out/samples.txt"
done
