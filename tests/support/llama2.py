"""A tokenizer as Llama 2 has it, of SentencePiece's pieces with scores: that of stories260K."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast


def llama2_tokenizer(pieces: Sequence[tuple[str, float]]) -> PreTrainedTokenizerFast:
    """The tokenizer of stories260K: pieces (as hex) with scores, the best pair of neighbours merged
    first, BOS in front.
    """
    texts = [bytes.fromhex(piece).decode().replace(" ", "▁").strip("\n") for piece, _ in pieces]
    vocab = {text: i for i, text in enumerate(texts)}
    ranked = sorted((-score, i) for i, (_, score) in enumerate(pieces) if i > 258)
    merges = [
        (texts[i][:at], texts[i][at:]) for _, i in ranked for at in range(1, len(texts[i]))
        if texts[i][:at] in vocab and texts[i][at:] in vocab
    ]  # fmt: skip
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    bpe.decoder = decoders.Sequence(steps)
    bpe.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
