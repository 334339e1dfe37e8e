"""Chat templates that are nearly ChatML, and what is done with each."""

_TURN = "'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'"
_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def loop(turn: str = _TURN, *, before: str = "", inside: str = "", end: str = _END) -> str:
    """A template that writes `turn` for each message."""
    return f"{before}{{% for m in messages %}}{inside}{{{{ {turn} }}}}{{% endfor %}}{end}"


_SYSTEM_BY_VARIABLE = (
    "{% set system_message = 'You are helpful.\\nSay \"yes\".' %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% endif %}"
    "{% if system_message %}"
    "{{ '<|im_start|>system\\n' + system_message + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in loop_messages %}{{ " + _TURN + " }}{% endfor %}" + _END
)

ACCEPTED = {
    "plain": loop(),
    "lines": "{%- for m in messages %}\n    {{- " + _TURN + " }}\n{%- endfor %}\n" + _END,
    "literal text": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "generation marks": (
        "{% for m in messages %}{% generation %}{{ " + _TURN + " }}{% endgeneration %}{% endfor %}"
    )
    + _END,
    "tools only": loop(before="{% if tools %}{{ strftime_now('%d') }}{% endif %}"),
    "other parts": loop(inside="{% if m.content is not string %}{% continue %}{% endif %}"),
    "no beginning": loop(before="{{ bos_token }}"),
    "a name of its own": loop().replace("'<|im_start|>'", "turn_token"),
    "another end token": loop().replace("'<|im_end|>\\n'", "eos_token + '\\n'"),
    "default text by variable": _SYSTEM_BY_VARIABLE.replace("if system_message", "if true"),
    "pieces of text": loop(
        "t", inside="{% set t %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content | string }}"
        "{{ '<|im_end|>\n' | safe }}{% endset %}",
    ),
    "a macro": loop("f(m)", before="{% macro f(m) %}{{ " + _TURN + " }}{% endmacro %}"),
    "parts of contents": loop(
        _TURN.replace("m['content']", "c"),
        inside="{% if m.content is string %}{% set c = m.content %}"
        "{% elif m.content is iterable %}{% set c = m.content[0].text %}{% endif %}",
    ),
    "no content": loop(_TURN.replace("m['content']", "(m.content or '') | default('', true)")),
    "a role that never comes": loop(inside="{% if m.role == 'tool' %}{{ 1/0 }}{% endif %}"),
}  # fmt: skip

# Only conversations without a system text, or with an empty one, are refused.
NEEDS_SYSTEM = {
    "default text with a date": loop(
        before="{% if messages[0].role != 'system' %}<|im_start|>system\nIt is "
        "{{ strftime_now('%d %b %Y') }}<|im_end|>\n{% endif %}"
    ),
    "default text by chance": loop(
        before="{% if messages[0].role != 'system' %}<|im_start|>system\n"
        "{{ ['a', 'b'] | random }}<|im_end|>\n{% endif %}"
    ),
    "default text by question": loop(
        before="{% if messages[0].role != 'system' %}<|im_start|>system\n"
        "{{ messages | length }}<|im_end|>\n{% endif %}"
    ),
    "default text with a marker": loop(
        before="{% if messages[0].role != 'system' %}<|im_start|>system\n"
        "Use <tool_call>.<|im_end|>\n{% endif %}"
    ),
    "an example before the question": loop(
        before="{% if messages[0].role != 'system' %}<|im_start|>system\na<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n{% endif %}"
    ),
    "a system text is demanded": loop(
        before="{% if messages[0].role != 'system' %}{{ raise_exception('none') }}{% endif %}"
    ),
}
EMPTY_REFUSED = {
    "default text by variable, tested": _SYSTEM_BY_VARIABLE,
    "empty system text left out": loop(
        inside="{% if m == {'role': 'system', 'content': ''} and loop.first %}"
        "{% continue %}{% endif %}"
    ),
}  # fmt: skip

REFUSED = {
    "another format": "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
    "markers only in a comment": "{# <|im_start|> <|im_end|> #}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "content trimmed": loop(_TURN.replace("m['content']", "m['content'] | trim")),
    "content stripped at its end": loop(_TURN.replace("m['content']", "m['content'].rstrip()")),
    "content cut": loop(_TURN.replace("m['content']", "m['content'][:5000]")),
    "content escaped": loop(_TURN.replace("m['content']", "m['content'] | e")),
    "content as JSON": loop(_TURN.replace("m['content']", "m['content'] | tojson")),
    "content in lower case": loop(_TURN.replace("m['content']", "m['content'] | lower")),
    "a word replaced": loop(_TURN.replace("m['content']", "m['content'] | replace('zebra', '')")),
    "a word watched for": loop(inside="{% if 'zebra' in m.content %}{{ 'hoofs' }}{% endif %}"),
    "a word alone": loop(inside="{% if m.content == 'zebra' %}{{ 'hoofs' }}{% endif %}"),
    "a length": loop(inside="{% if m.content | length == 1234 %}{{ 'long' }}{% endif %}"),
    "two words watched for": loop(
        inside="{% if 'lion' in m.content and 'zebra' in m.content %}{{ 'hoofs' }}{% endif %}"
    ),
    "words in two messages": loop(
        before="{% set a, b = messages[0].content, messages[-1].content %}"
        "{% if 'lion' in a and 'zebra' in b %}{{ 'hoofs' }}{% endif %}"
    ),
    "a text among others": loop(inside="{% if m.content in 'lion zebra' %}{{ 'a' }}{% endif %}"),
    "a text in a list": loop(inside="{% if m.content in ['lion'] %}{{ 'a' }}{% endif %}"),
    "numbers": loop(
        _TURN.replace("m['content']", "(n ~ '' if n > 99 else m.content)"),
        inside="{% set n = m.content | int(-7) %}",
    ),
    "digits alone": loop(inside="{% if m.content.isdigit() %}{{ 'a' }}{% endif %}"),
    "capitals": loop(inside="{% if m.content is upper and m.content != 'A' %}a{% endif %}"),
    "lines": loop(_TURN.replace("m['content']", "m.content.split('\\n')[:99] | join('\\n')")),
    "words": loop(inside="{% if m.content | wordcount > 20 * 1500 %}{{ 'a' }}{% endif %}"),
    "a product of lengths": loop(_TURN.replace("m['content']", "m.content[:300 * 1000]")),
    "nearly a length": loop(_TURN.replace("m['content']", "m.content | truncate(100000)")),
    "captured text": loop(
        "t | replace('zebra', '')", inside="{% set t %}{{ " + _TURN + " }}{% endset %}"
    ),
    "filtered text": loop(
        "''", inside="{% filter replace('zebra', '') %}{{ " + _TURN + " }}{% endfilter %}"
    ),
    "text of a macro": loop(
        "f(m).replace('zebra', '')", before="{% macro f(m) %}{{ " + _TURN + " }}{% endmacro %}"
    ),
    "joined text": loop(_TURN.replace("m['content']", "('a' ~ m.content)[1:2000000]")),
    "all texts": loop(
        before="{% set t = messages | map(attribute='content') | join %}"
        "{% if t | length > 9 * 9 ** 9 %}a{% endif %}"
    ),
    "texts left out": loop().replace(
        "in messages", "in messages | rejectattr('content', 'eq', 'zebra')"
    ),
    "texts that repeat": loop(
        before="{% set t = messages | map(attribute='content') | unique | list %}"
        "{% if t | length == 77 %}a{% endif %}"
    ),
    "a letter": loop(inside="{% if m.content[0] == '/' %}{% endif %}"),
    "letters": loop(inside="{% for c in m.content %}{% endfor %}"),
    "a number of questions": loop(
        before="{% set n = messages | selectattr('role', 'eq', 'user') | list | length %}"
        "{% if n > 5 * 8 %}a{% endif %}"
    ),
    "a number of turns": loop(before="{% if messages | length > 41 %}{{ 'many' }}{% endif %}"),
    "thoughts dropped": loop(_TURN.replace("m['content']", "m['content'].split('</think>')[-1]")),
    "only the last messages": loop().replace("in messages", "in messages[-6:]"),
    "a role renamed": loop(_TURN.replace("m['role']", "m['role'] | replace('assistant', 'model')")),
    "a role with a capital": loop(_TURN.replace("m['role']", "m['role'] | capitalize")),
    "a beginning": loop(before="{{ '<|endoftext|>' }}"),
    "a beginning by name": loop(before="{{ pad_token }}"),
    "a beginning that nobody says": loop(before="{{ cls_token }}"),
    "tokens that some versions know": loop(before="{{ additional_special_tokens }}"),
    "a beginning where nobody says": loop(before="{% if mask_token %}{{ mask_token }}{% endif %}"),
    "an end": loop(end=_END + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"),
    "a missing newline": loop(_TURN.replace("<|im_end|>\\n", "<|im_end|>")),
    "a newline too many": loop(_TURN.replace("<|im_end|>\\n", "<|im_end|>\\n\\n")),
    "no newline after the role": loop(_TURN.replace("+ '\\n' +", "+ ' ' +")),
    "another marker": loop().replace("<|im_start|>", "<|fim_prefix|>"),
    "a thought begun": loop(end=_END.replace("assistant\\n", "assistant\\n<think>\\n")),
    "an answer always begun": loop(end="<|im_start|>assistant\n"),
    "an answer never begun": loop(end=""),
    "system text in the user's turn": (
        "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.s = m.content + '\\n' %}{% else %}{{ '<|im_start|>' + m.role + '\\n' + ns.s + "
        "m.content + '<|im_end|>\\n' }}{% set ns.s = '' %}{% endif %}{% endfor %}" + _END
    ),
    "later system texts dropped": loop(
        inside="{% if m.role == 'system' and not loop.first %}{% continue %}{% endif %}"
    ),
    "empty messages dropped": loop(inside="{% if not m.content %}{% continue %}{% endif %}"),
    "turns must alternate": loop(
        inside="{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}"
    ),
    "system refused": loop(
        inside="{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    ),
    "a date": loop(before="{{ strftime_now('%d %b %Y') }}"),
    "chance": loop(before="{{ range(9) | random }}"),
    "no chat at all": "hello",
    "nothing": "",
    "a fault in it": "{% for m in messages %}{{ m.",
    "a number divided by zero": loop(before="{{ 1 / 0 }}"),
    "a look inside": loop(before="{{ messages.__class__.__mro__ }}"),
    "a lone surrogate": loop(before="{{ '\\ud800' }}"),
    "recursion": loop(before="{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    "nested": "(" .join(["{{ "] + [""] * 5000) + "1" + ")" * 5000 + " }}",
    "a long default text": loop(
        before="{% if messages[0].role != 'system' %}<|im_start|>system\n{{ 'a' * 4000000 }}"
        "<|im_end|>\n{% endif %}"
    ).replace("m['content']", "m['content'] | trim"),
    "no files": loop(before="{% include '/etc/passwd' %}"),
}  # fmt: skip
ENDLESS = {
    "endless": loop(before="{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2),
    "a bomb": loop(before="{{ 'a' * 10 ** 10 }}"),
    "a bomb of lists": loop(before="{% set x = ([0] * 10 ** 8) * 100 %}"),
    "a power": loop(before="{{ 9 ** 9 ** 9 }}"),
}  # fmt: skip
