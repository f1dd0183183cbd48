"""The file that a run's model brings where no class of transformers has its pooling.

It is all the code there is, needs torch and transformers alone, and is run only by who says
``trust_remote_code=True``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

CODE_FILE = "pooled_classifier.py"

_HEAD = '''"""A pretrained model, pooled, under one linear head: how this classifier was trained.

No class of transformers pools a {model_type} so, hence this one. Load it with

    {auto}.from_pretrained(FOLDER, trust_remote_code=True)

Licence: Apache-2.0, as dare-agg's.
"""

import torch
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel
from transformers.modeling_outputs import {output}


class PooledClassifier(PreTrainedModel):
    """Scores (n, labels) of {inputs}."""

    config_class = CONFIG_MAPPING[{model_type!r}]
    base_model_prefix = {body!r}
    # They keep classes with heads of their own, which nobody trained, from loading this folder.
    _keys_to_ignore_on_load_unexpected = [r"^(?:{guards})$", r"^unused\\."]

    def __init__(self, config):
        super().__init__(config)
        self.{body} = AutoModel.from_config(config)
        self.pooled_head = torch.nn.Linear({width}, config.num_labels)
        self.post_init()

'''
_TEXT = '''    def forward(self, input_ids=None, attention_mask=None, labels=None, **inputs):
        """Logits, and the cross entropy where labels are given."""
        inputs.pop("return_dict", None)
        inputs.pop("use_cache", None)
        out = self.{body}(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        states = out.last_hidden_state
        {pooled}
        logits = self.pooled_head(pooled)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
'''
_POOLED = {
    "cls": "pooled = states[:, 0]",
    "mean": """mask = attention_mask
        mask = states.new_ones(states.shape[:2]) if mask is None else mask
        mask = mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)""",
}
_IMAGE = '''    def forward(self, pixel_values=None, labels=None, **inputs):
        """Logits, and the cross entropy where labels are given."""
        inputs.pop("return_dict", None)
        states = self.{body}(pixel_values=pixel_values, **inputs).last_hidden_state
        # (n, channels, y, x) of a convolutional net, (n, patches, width) of a transformer.
        pooled = states.mean(dim=(2, 3)) if states.dim() == 4 else states.mean(dim=1)
        logits = self.pooled_head(pooled)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
'''


def _filled(form: str, guards: Sequence[str], **words: object) -> str:
    return form.format(guards="|".join(map(re.escape, guards)), **words)


def text_code(
    *, model_type: str, body: str, pooling: str, width: int, guards: Sequence[str]
) -> str:
    """The class for texts: "mean" over the tokens that the mask has, or the first token ("cls")."""
    return _filled(
        _HEAD + _TEXT,
        guards,
        model_type=model_type,
        body=body,
        width=width,
        pooled=_POOLED[pooling],
        auto="AutoModelForSequenceClassification",
        output="SequenceClassifierOutput",
        inputs="texts",
    )


def image_code(
    *, model_type: str, body: str, pooling: str, width: int, guards: Sequence[str]
) -> str:
    """The class for images: the mean over places."""
    return _filled(
        _HEAD + _IMAGE,
        guards,
        model_type=model_type,
        body=body,
        width=width,
        auto="AutoModelForImageClassification",
        output="ImageClassifierOutputWithNoAttention",
        inputs="images",
    )


LITE_CODE = '''"""EfficientNet-lite, its features pooled under one linear head.

transformers has no such network; the package efficientnet-lite-pytorch has. Load it with

    AutoModelForImageClassification.from_pretrained(FOLDER, trust_remote_code=True)

Licence: Apache-2.0, as dare-agg's.
"""

import torch
from efficientnet_lite_pytorch import EfficientNet
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class LiteConfig(PreTrainedConfig):
    """Which network of the family it is."""

    model_type = "efficientnet-lite-pooled"
    network: str = "efficientnet-lite0"


class PooledClassifier(PreTrainedModel):
    """Scores (n, labels) of images."""

    config_class = LiteConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.body = EfficientNet.from_name(config.network)
        width = self.body._fc.in_features
        del self.body._fc
        self.pooled_head = torch.nn.Linear(width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values=None, labels=None, **inputs):
        """Logits, and the cross entropy where labels are given."""
        pooled = self.body.extract_features(pixel_values).mean(dim=(2, 3))
        logits = self.pooled_head(pooled)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
'''
