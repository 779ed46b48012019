"""A tokenizer of Hugging Face's kind, made on the spot."""

from collections.abc import Sequence
from pathlib import Path


def hugging_face_tokenizer(folder: Path, words: Sequence[str] = ()) -> Path:
    """A byte-level tokenizer as SigLIP's is: id 1 both ends a text and pads it."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Decoder()
    trainer = BpeTrainer(special_tokens=["<unk>", "</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(str(folder))
    return folder
