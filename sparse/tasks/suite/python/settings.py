"""Where a line of Python may stand, and lines that say nothing of any task.

No setting has quotes, brackets other than those of calls, loops, conditions, `return` or `True`,
since these are what the tasks ask about.
"""

from __future__ import annotations

from sparse.tasks.recipe import PerSplit

ANYWHERE = PerSplit(
    train=(
        "$form",
        "def $f7($v7):\n    $form",
        "    def $f7(self):\n        $form",
        "    def $f7(self, $v7):\n        $form",
        "import $mod7\n\n$form",
        "def $f7($v7, $v8):\n    $form",
        "    $v7 = $v8\n    $form",
        "        $v7 += 1\n        $form",
        "# $v7 of the $v8\n$form",
        "$v7 = None\n$form",
        "    @property\n    def $f7(self):\n        $form",
        "    try:\n        $form",
    ),
    validation=(
        "class $cls7($cls8):\n    def $f7(self):\n        $form",
        "    global $v7\n    $form",
        "    $f7($v7)\n    $form",
        "        del $v7\n        $form",
        "    # $v7\n    $form",
        "    pass\n\ndef $f7():\n    $form",
        "    finally:\n        $form",
        "    $v7 = $v8 = None\n    $form",
    ),
    test=(
        "    @classmethod\n    def $f7(cls, $v7):\n        $form",
        "async def $f7($v7):\n    $form",
        "from $mod7 import $f7\n\n$form",
        "    assert $v7\n    $form",
        "        self.$f7()\n        $form",
        "    $v7 -= $v8\n    $form",
        "def $f7(*$v7):\n    $form",
        "    except $cls7:\n        $form",
        "    nonlocal $v7\n    $form",
        "    $v7.$f7($v8)\n    $form",
    ),
)
"""Settings for one or more lines of code."""

INDENTED = PerSplit(
    *(tuple(s for s in of if not str(s).splitlines()[-1].startswith("$form")) for of in ANYWHERE)
)
"""The settings in which the line is indented."""

INSIDE = PerSplit(
    *(tuple(str(setting).replace("$v", "$list") for setting in of) for of in ANYWHERE)
)
"""The settings without variables: other words stand for them."""

FILLER = (
    "import gc\n",
    "import abc\n",
    "import array\n",
    "counter = 0\n",
    "maximum = 100\n",
    "delay = 5\n",
    "# setup\n",
    "# see below\n",
    "# internal\n",
    "del scratch\n",
    "del helper\n",
    "del wrapper\n",
    "prepare()\n",
    "initialize()\n",
    "register()\n",
)
"""Texts for `Task.filler`: lines that say nothing of any task."""
