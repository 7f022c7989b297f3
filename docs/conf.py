"""How Sphinx makes these pages: make docs."""

import shutil
import sys
from pathlib import Path

import nufilt_jax

ROOT = Path(__file__).parents[1]

project = "nufilt_jax"
author = "the authors of nufilt_jax"
release = nufilt_jax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.githubpages",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "cyclopts.ext.sphinx",
]
# Cyclopts begins a usage with the running program, of which it replaces the first word by the command.
sys.argv[0] = "nufilt"
html_theme = "sphinx_book_theme"
html_title = "nufilt_jax"
html_static_path = ["_static"]
# The search stands in the sidebar already.
html_theme_options = {"home_page_in_toc": True, "show_toc_level": 2, "navbar_persistent": []}
html_math_renderer = "mathml"
exclude_patterns = ["_build"]
smartquotes_action = "q"  # no dash for the two of an option
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are run by the tests, and hold what they showed
napoleon_use_ivar = True  # attributes stand once
napoleon_attr_annotations = False  # shapes begin with a star, which is markup there
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True}
# Pages that are included from elsewhere keep their own first heading.
suppress_warnings = ["myst.header"]

# The notebooks stay where they are run.
(ROOT / "docs" / "notebooks").mkdir(exist_ok=True)
for notebook in (ROOT / "notebooks").glob("*.ipynb"):
    shutil.copyfile(notebook, ROOT / "docs" / "notebooks" / notebook.name)


def setup(app):
    """Equations as MathML, which browsers show by themselves: no script, so no network."""
    from docutils import nodes
    from docutils.utils.math.latex2mathml import tex2mathml

    def renderer(as_block):
        def visit(writer, node):
            writer.body.append(tex2mathml(node.astext(), as_block=as_block))
            raise nodes.SkipNode

        return visit, None

    app.add_html_math_renderer("mathml", renderer(as_block=False), renderer(as_block=True))
