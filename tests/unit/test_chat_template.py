"""Chat templates render as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from services.core.errors import ConfigError, InvalidRequestError
from services.gateway.chat_template import ChatTemplate, load_chat_template

CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{% endif %}"""
LLAMA = """{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\n\n" + system }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {{- '<|start|>' + message.role + '<|end|>' }}
    {%- generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- endfor %}"""
JSON_AND_LISTS = """{%- set ns = namespace(n=0) -%}
{% for m in messages if m.content is not none %}
  {% set ns.n = ns.n + 1 %}
  {{ ns.n }} {{ {"role": m.role, "text": m.content, "<>": "é"} | tojson }} {{ m | tojson(indent=2) }}
  {# a comment #}
{% endfor %}
{{ messages | map(attribute='role') | join(', ') }} {{ (messages | last).content.split(' ')[0] }}"""
CONVERSATION = [
    {"role": "system", "content": "You are <b>terse</b>."},
    {"role": "user", "content": "  né?\n"},
    {"role": "assistant", "content": "Ja & nein."},
    {"role": "user", "content": 'Warum "so"?'},
]


def reference(template: str, messages: list[dict[str, str]]) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])), bos_token="<s>", eos_token="</s>"
    )
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("template", [CHATML, LLAMA, JSON_AND_LISTS])
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:], CONVERSATION[1:2] * 9])
def test_as_transformers_does(template: str, messages: list[dict[str, str]]) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert ChatTemplate(template, tokens).render(messages) == reference(template, messages)


def test_what_a_template_refuses_is_the_clients_mistake() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        ChatTemplate(LLAMA, {"bos_token": "", "eos_token": ""}).render([{"role": "robot", "content": "x"}])
    with pytest.raises(InvalidRequestError, match="chat template"):
        ChatTemplate("{{ messages[3].content + 1 }}", {}).render(CONVERSATION[:1])


def test_a_template_reaches_nothing_of_the_process() -> None:
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% set _ = messages.clear() %}"):
        with pytest.raises(InvalidRequestError):
            ChatTemplate(source, {}).render(CONVERSATION)


def test_where_it_is_found(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}1"}))
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render(CONVERSATION) == "<s>1"
    several = [{"name": "tool_use", "template": "2"}, {"name": "default", "template": "3"}]
    config.write_text(json.dumps({"chat_template": several}))
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render(CONVERSATION) == "3"
    (tmp_path / "chat_template.jinja").write_text("4")
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render(CONVERSATION) == "4"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match="chat template"):
        load_chat_template(tmp_path)
