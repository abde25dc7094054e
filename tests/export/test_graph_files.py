"""Architectures as files for graph programs: read back, they have the edges of the genotype, whatever its names are."""

import re
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch

from nas.errors import InputError
from nas.export.graph_files import dot, edges_of, graphml, network_graph, svg
from nas.export.package import FORMATS
from nas.export.parity import TOLERANCE, ExportMismatch, check_exports, drawn, export_architecture
from nas.model_file import ModelSpec
from search_spaces import graph
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import Genotype, StageGenotype, read_genotype


def test_every_edge_of_every_cell_stands_in_the_graph(case):
    genotype = case.spec.genotype
    whole = network_graph(genotype)
    assert nx.is_directed_acyclic_graph(whole)
    if isinstance(genotype, Genotype):
        cells = [graph.cell_graph(cell) for _, cell in genotype.cells]
        assert whole.number_of_edges() == sum(cell.number_of_edges() for cell in cells)
        assert nx.number_weakly_connected_components(whole) >= len(cells)
        operations = sorted(name for cell in cells for _, _, name in cell.edges(data="operation"))
        assert sorted(name for *_, name in edges_of(genotype)) == operations
    else:
        assert whole.number_of_nodes() == sum(genotype.depths) + 2
        assert [data["width"] for _, data in whole.nodes(data=True) if "width" in data] == [
            width for depth, width in zip(genotype.depths, genotype.widths, strict=True) for _ in range(depth)
        ]
    ElementTree.fromstring(svg(genotype))


def test_files_are_read_back_without_this_project(cases, tmp_path, attack):
    for name in ("awkward", "plain"):
        case = cases[name]()
        folder = tmp_path / name
        from nas.export.package import export_model

        export_model(case.spec, case.model, folder, ["graphml", "dot", "svg"])
        assert [file.file for file in check_exports(folder, case.spec, case.model, case.inputs, attack)] == [
            "architecture.graphml",
            "architecture.dot",
            "architecture.svg",
        ]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("architecture.graphml", "sep_conv_5x5", "sep_conv_3x3"),
        ("architecture.dot", "sep_conv_5x5", "sep_conv_3x3"),
        ("architecture.svg", "sep_conv_5x5", "sep_conv_3x3"),
    ],
)
def test_an_altered_file_is_found(arnas, tmp_path, file, old, new, attack):
    from nas.export.package import export_model

    export_model(arnas.spec, arnas.model, tmp_path, [file.partition(".")[2]])
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    with pytest.raises(ExportMismatch, match="another network"):
        check_exports(tmp_path, arnas.spec, arnas.model, arnas.inputs, attack)


def test_names_cannot_break_out_of_a_dot_file(cases):
    text = dot(cases["awkward"]().spec.genotype)
    # What is no quoted text is this grammar and nothing else.
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "Q", text)
    line = r"(digraph architecture \{|  rankdir=LR;|  node \[shape=box, style=rounded\];|  subgraph cluster_\d+ \{"
    line += r"|    label=Q;|    Q \[label=Q\];|  \}|  Q -> Q \[label=Q\];|\})"
    assert all(re.fullmatch(line, row) for row in bare.splitlines())


def test_graphml_of_stages():
    again = nx.parse_graphml(graphml(StageGenotype("plain", (1, 2), (4, 8))))
    assert list(again.nodes) == ["input", "stage 1/1", "stage 2/1", "stage 2/2", "output"]
    assert again.nodes["stage 2/1"]["width"] == 8 and again.graph["space"] == "plain"


def test_an_architecture_is_exported_without_weights(arnas, tmp_path, imported, attack):
    formats = [name for name, entry in FORMATS.items() if entry.meaningful]
    files = export_architecture(arnas.spec, tmp_path, formats, attack)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {file.file for file in files} == {
        "genotype.json", "network.py", "timm_model.py",
        "architecture.graphml", "architecture.dot", "architecture.svg"
    }  # fmt: skip
    assert read_genotype(tmp_path / "genotype.json") == arnas.spec.genotype
    built = imported(tmp_path / "network.py").build()
    assert built(arnas.inputs).shape == (len(arnas.inputs), len(arnas.spec.classes))
    refused = {
        "onnx": "holds the weights",
        "robustbench": "holds the weights",
        "card": "says how a network was trained",
    }
    for name, reason in refused.items():
        with pytest.raises(InputError, match=f"'{name}' {reason}"):
            export_architecture(arnas.spec, tmp_path / "new", ["json", name], attack)
    assert not (tmp_path / "new").exists()


def test_a_network_drawn_for_comparison_sees_its_images():
    spec = ModelSpec(load_genotype("arnas"), 2, 20, (3, 32, 32), ("a", "b", "c"), (0.5,) * 3, (0.5,) * 3)
    model, inputs = drawn(spec)
    with torch.no_grad():
        logits = model(inputs)
    assert (logits[0] - logits[1]).abs().max() > 10 * TOLERANCE
