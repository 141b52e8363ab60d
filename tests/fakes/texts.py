"""Small sets of texts on disk, a word tokenizer and a tiny encoder, for tests of the text data code."""

from __future__ import annotations

from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["good", "bad", "film", "plot", "the", "a", "very", "not", "long", "short"]
CLASSES = ["negative", "positive"]


def make_tokenizer(special: bool = True, **kwargs) -> PreTrainedTokenizerFast:
    """One token per word; with ``special``, [CLS] in front and [SEP] behind."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **{**options, **kwargs})


def write_encoder(folder, layers=3, vocabulary=14, seed=0) -> str:
    """A BERT without classifier, as published encoders are, with its tokenizer; returns the folder."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def text(row: int, longest: int = 12) -> str:
    """Words whose first tells the label of an even or odd row; no two of the first rows are equal."""
    filler = [WORDS[(row // 7**place) % 7 + 2] for place in range(1 + row * 5 % longest)]
    return " ".join([WORDS[row % 2], *filler, WORDS[2 + row % 8], WORDS[2 + row // 8 % 8], WORDS[2 + row // 64 % 8]])


def columns(count: int, first: int = 0, text_column: str = "sentence", label_column: str = "label") -> dict[str, list]:
    return {text_column: [text(first + i) for i in range(count)], label_column: [(first + i) % 2 for i in range(count)]}


def write_texts(folder, splits: dict[str, dict[str, list]], features=None) -> str:
    """Writes parquet files with Hugging Face metadata; returns the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, own in splits.items():
        kinds = features or {
            name: datasets.ClassLabel(names=CLASSES) if isinstance(values[0], int) else datasets.Value("string")
            for name, values in own.items()
        }
        table = datasets.Dataset.from_dict(own, features=datasets.Features(kinds))
        table.to_parquet(str(Path(folder) / f"{split}.parquet"))
    return str(folder)
