"""Text to batches: readers, tokenizers, prepared shards, and the order of training.

tokenizer = load_tokenizer("bytes")
dataset = prepare(["corpus/"], "data/corpus", tokenizer)
batch = Batches(dataset, seq_len=1024, batch_size=16, seed=0).batch(step=0)
"""

from .errors import DataError, MissingPackageError, UnreachableError
from .loader import UNSCORED, Batch, Batches, OrderedRows
from .mixture import MixedBatches, MixedHeldOut
from .packing import PackedBatches
from .preparation import prepare
from .reader import Document, Documents, read_documents
from .shards import TokenDataset, TokenizedDocument, is_prepared
from .tokenizer import StreamDecoder, Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "UNSCORED",
    "Batch",
    "Batches",
    "DataError",
    "Document",
    "Documents",
    "MissingPackageError",
    "MixedBatches",
    "MixedHeldOut",
    "OrderedRows",
    "PackedBatches",
    "StreamDecoder",
    "TokenDataset",
    "TokenizedDocument",
    "Tokenizer",
    "UnreachableError",
    "is_prepared",
    "load_tokenizer",
    "prepare",
    "read_documents",
    "train_bpe",
]
