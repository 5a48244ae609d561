import doctest
import importlib
import inspect
import pkgutil
import re

import lightning.pytorch as pl
import matplotlib
import matplotlib.pyplot as plt
import pytest

import discover_sc
from discover_sc._training_plan import DiscoverTrainingPlan

matplotlib.use("Agg")

MODULES = ["discover_sc"] + [
    module.name
    for module in pkgutil.walk_packages(discover_sc.__path__, "discover_sc.")
    if not module.name.endswith("__main__")  # runs the command line when imported
]
NAMESPACES = (discover_sc, discover_sc.data, discover_sc.evaluation, discover_sc.plotting)


def find_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for name in MODULES for test in finder.find(importlib.import_module(name))]
    return [test for test in tests if test.examples]


def find_public_callables():
    """Public functions and classes by name, with the methods that this package defines."""
    found = {}
    for namespace in NAMESPACES:
        for name in namespace.__all__:
            item = getattr(namespace, name)
            if inspect.ismodule(item):
                continue
            found[f"{namespace.__name__}.{name}"] = item
            if inspect.isclass(item):
                for method, value in vars(item).items():
                    if not method.startswith("_") and callable(getattr(item, method)):
                        found[f"{namespace.__name__}.{name}.{method}"] = getattr(item, method)
                    elif not method.startswith("_") and isinstance(value, property):
                        found[f"{namespace.__name__}.{name}.{method}"] = value
    return found


PUBLIC = find_public_callables()
# the trainer calls these by position; what they get is documented by Lightning
HOOKS = {name for name in PUBLIC if name.rsplit(".", 1)[1] in vars(pl.Callback)}
METHODS = {name for name in PUBLIC if isinstance(PUBLIC.get(name.rsplit(".", 1)[0]), type)}
EXAMPLES_WANTED = sorted(set(PUBLIC) - METHODS - {"discover_sc.data.kang"})  # kang may download
CALLABLES = sorted(n for n, item in PUBLIC.items() if not isinstance(item, property))


def section(docstring, title):
    """Body of a section of a numpydoc docstring, or None."""
    pattern = rf"^{title}\n-+\n(.*?)(?=^\S[^\n]*\n-+\n|\Z)"
    match = re.search(pattern, inspect.cleandoc(docstring), flags=re.MULTILINE | re.DOTALL)
    return match and match.group(1)


def documented_parameters(docstring):
    headings = re.findall(r"^(\S.*)$", section(docstring, "Parameters") or "", flags=re.MULTILINE)
    return [name.strip() for heading in headings for name in heading.split(",")]


def signature_parameters(item):
    prefixes = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(item).parameters.values()
    return [prefixes.get(p.kind, "") + p.name for p in parameters if p.name != "self"]


@pytest.mark.parametrize("test", find_examples(), ids=lambda test: test.name)
def test_examples_of_docstrings_print_what_they_say(test, capsys):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    failures = []
    result = runner.run(test, out=failures.append)
    plt.close("all")
    assert result.attempted > 0
    assert result.failed == 0, "".join(failures)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_objects_say_what_they_are_in_one_line(name):
    docstring = inspect.getdoc(PUBLIC[name]) or ""
    first, _, rest = docstring.partition("\n")
    assert first.endswith("."), "the first line is a sentence"
    assert not rest or rest.startswith("\n"), "an empty line follows it"


@pytest.mark.parametrize("name", sorted(set(CALLABLES) - HOOKS))
def test_documented_parameters_are_those_of_the_signature(name):
    item = PUBLIC[name]
    assert sorted(documented_parameters(item.__doc__)) == sorted(signature_parameters(item))


@pytest.mark.parametrize("name", sorted(set(CALLABLES) - HOOKS))
def test_what_is_returned_is_documented(name):
    item = PUBLIC[name]
    if inspect.isclass(item) or inspect.signature(item).return_annotation in (None, "None"):
        assert section(item.__doc__, "Returns") is None
    else:
        assert (section(item.__doc__, "Returns") or "").strip()


def test_plan_arguments_that_train_documents_are_those_of_the_plan():
    body = section(discover_sc.DISCoVeR.train.__doc__, "Parameters")
    text = body.split("plan_kwargs\n")[1].split("**trainer_kwargs\n")[0]
    documented = re.findall(r"``(\w+)``", text)
    accepted = set(signature_parameters(DiscoverTrainingPlan)) - {"module"}
    assert sorted(documented) == sorted(accepted)


@pytest.mark.parametrize("name", EXAMPLES_WANTED)
def test_public_functions_and_classes_have_an_example(name):
    assert ">>>" in (section(PUBLIC[name].__doc__, "Examples") or "")
