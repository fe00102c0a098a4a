"""The pages say what is there."""

import re

import pytest
from helpers import ROOT


def test_details_name_places_that_exist():
    """Each numbered point ends in `file:name`, and the numbers run on."""
    text = (ROOT / "docs" / "details.md").read_text()
    points = re.split(r"^\d+\. ", text, flags=re.MULTILINE)[1:]
    assert [int(number) for number in re.findall(r"^(\d+)\. ", text, re.MULTILINE)] == list(range(1, len(points) + 1))
    for point in points:
        places = re.findall(r"`([\w/]+\.py):(\w+)`", point)
        assert places, point
        for file, name in places:
            source = (ROOT / file).read_text()
            assert re.search(rf"^ *(def|class) {name}\b|^{name} = ", source, re.MULTILINE), f"{file}:{name}"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "results/README.md",
        "docs/details.md",
        "docs/bandits.md",
        "docs/speed.md",
        "docs/tasks.md",
        "docs/deploy.md",
        "docs/benchmark.md",
    ],
)
def test_links_lead_somewhere(page):
    file = ROOT / page
    for link in re.findall(r"\]\((?!http|\.\./\.\./)([^)#]+)", file.read_text()):
        assert (file.parent / link).exists(), link
