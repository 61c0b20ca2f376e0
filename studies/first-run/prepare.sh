#!/usr/bin/env bash
# From books to token shards. BOOKS_TRAIN and BOOKS_VALID: .jsonl.xz, one {"text": ...} per line.
set -euo pipefail
: "${BOOKS_TRAIN:?path of the training books}" "${BOOKS_VALID:?path of the validation books}"
mkdir -p data/books
xz -dc "$BOOKS_TRAIN" | sed -n '1,400p' > data/books/train-400.jsonl
attamba data tokenizer data/books/bpe-8k data/books/train-400.jsonl --vocab-size 8192
attamba data prepare data/books/train data/books/train-400.jsonl --tokenizer data/books/bpe-8k
attamba data prepare data/books/valid "$BOOKS_VALID" --tokenizer data/books/bpe-8k
