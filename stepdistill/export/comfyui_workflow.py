"""A workflow that opens in ComfyUI: base, LoRA, and the sampler's numbers already set.

The JSON is the page's own form, version 0.4: nodes with typed inputs and outputs, and links
[id, from node, its output, to node, its input, type].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.export.card import MASK_FILE, image_file
from stepdistill.export.comfyui_nodes import NODES
from stepdistill.export.tool_rules import ToolRules

WORKFLOW = "workflow.json"
# Nodes for images as channels, and their widgets: no noise mask, as the stock call has none.
CHANNELS: dict[str, list[Any]] = {
    "InstructPixToPixConditioning": [],
    "InpaintModelConditioning": [False],
}
Output = tuple[int, int]  # (node, its output)


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []

    def add(self, kind: str, widgets: Sequence[Any] = (), **inputs: Output | None) -> Output:
        """A node, its first output; inputs: what each is linked to, by name."""
        rule, number = NODES[kind], len(self.nodes) + 1
        links: dict[str, int] = {}
        for slot, (name, type_) in enumerate(rule.inputs.items()):
            source = inputs.get(name)
            if source is not None:
                links[name] = len(self.links) + 1
                self.links.append([links[name], *source, number, slot, type_])
                self.nodes[source[0] - 1]["outputs"][source[1]]["links"].append(links[name])
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [40 + 340 * ((number - 1) // 3), 60 + 220 * ((number - 1) % 3)],
                "size": [310, 180],
                "flags": {},
                "order": number - 1,  # sources stand before what they feed
                "mode": 0,
                "inputs": [
                    {"name": name, "type": type_, "link": links.get(name)}
                    for name, type_ in rule.inputs.items()
                ],
                "outputs": [
                    {"name": type_, "type": type_, "links": [], "slot_index": slot}
                    for slot, type_ in enumerate(rule.outputs)
                ],
                "properties": {"Node name for S&R": kind},
                "widgets_values": list(widgets),
            }
        )
        return number, 0

    def json(self) -> dict[str, Any]:
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }


def _told(
    graph: _Graph, texts: Sequence[str], clip: Output, vae: Output, image_node: str | None
) -> list[Output]:
    """The conditions of the texts, and of an image where the model reads one."""
    if image_node is None:
        return [graph.add("CLIPTextEncode", [text], clip=clip) for text in texts]
    picture = graph.add("LoadImage", [image_file("images"), "image"])
    if image_node in CHANNELS:
        positive, negative = (graph.add("CLIPTextEncode", [text], clip=clip) for text in texts)
        both: dict[str, Output | None] = {"positive": positive, "negative": negative, "vae": vae}
        if "mask" in NODES[image_node].inputs:
            both["mask"] = graph.add("LoadImageMask", [MASK_FILE[1], "red", "image"])
        told = graph.add(image_node, CHANNELS[image_node], pixels=picture, **both)
        return [told, (told[0], 1)]
    if image_node != "ReferenceLatent":  # of Qwen: text and image in one
        name = "image1" if image_node.endswith("Plus") else "image"
        ends: dict[str, Output | None] = {"clip": clip, "vae": vae, name: picture}
        return [graph.add(image_node, [text], **ends) for text in texts]
    latent = graph.add("VAEEncode", pixels=picture, vae=vae)
    plain = [graph.add("CLIPTextEncode", [text], clip=clip) for text in texts]
    return [graph.add(image_node, conditioning=one, latent=latent) for one in plain]


def workflow(rules: ToolRules, record: Mapping[str, Any]) -> dict[str, Any]:
    """The workflow of a LoRA export whose record has settings for ComfyUI.

    Files of the base stand by the names that they are commonly kept under.
    """
    tools, graph = record["tools"], _Graph()
    comfy, (height, width) = tools["comfyui"], tools["size"]
    base = Path(str(record["base_model"] or "")).name or "base"
    base = base if base.endswith(".safetensors") else f"{base}.safetensors"
    if rules.in_one_checkpoint:
        model = graph.add("CheckpointLoaderSimple", [base])
        clip, vae = (model[0], 1), (model[0], 2)
    else:
        model = graph.add("UNETLoader", [base, "default"])
        vae = graph.add("VAELoader", [rules.vae])
    if rules.clip is not None:
        clip = graph.add(rules.clip[0], rules.clip[1:])
    model = graph.add("LoraLoaderModelOnly", [record["lora"]["file"], 1.0], model=model)
    if comfy["node"] is not None:
        model = graph.add(*comfy["node"], model=model)
    texts = (rules.before_prompt + "a prompt", "")
    positive, negative = _told(graph, texts, clip, vae, tools["image_node"])
    if comfy.get("flux_guidance") is not None:
        positive = graph.add("FluxGuidance", [comfy["flux_guidance"]], conditioning=positive)
    size = [width, height, *([tools["frames"]] if record["output"] == "frames" else []), 1]
    images: dict[str, Output | None] = {}
    if record["reads"] and record["output"] == "frames":
        images["start_image"] = graph.add("LoadImage", [image_file("frames"), "image"])
        if tools["reads_clip_vision"]:
            vision = graph.add("CLIPVisionLoader", ["clip_vision_h.safetensors"])
            images["clip_vision_output"] = graph.add(
                "CLIPVisionEncode", ["none"], clip_vision=vision, image=images["start_image"]
            )
    made = {"positive": positive, "negative": negative, "vae": vae, **images}
    latent = graph.add(rules.latent, size, **made)
    if rules.latent == "WanImageToVideo":
        positive, negative, latent = latent, (latent[0], 1), (latent[0], 2)
    ends = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
    if comfy["scheduler"] is not None:
        names = (comfy["sampler"], comfy["scheduler"])
        samples = graph.add(
            "KSampler", [0, "fixed", comfy["steps"], comfy["cfg"], *names, 1.0], **ends
        )
    else:
        sampler = graph.add("KSamplerSelect", [comfy["sampler"]])
        sigmas = graph.add("ManualSigmas", [comfy["sigmas"]])
        samples = graph.add(
            "SamplerCustom",
            [True, 0, "fixed", comfy["cfg"]],
            sampler=sampler,
            sigmas=sigmas,
            **ends,
        )
    pictures = graph.add("VAEDecode", samples=samples, vae=vae)
    if record["output"] == "frames":
        graph.add("SaveAnimatedWEBP", ["stepdistill", 16.0, False, 90, "default"], images=pictures)
    else:
        graph.add("SaveImage", ["stepdistill"], images=pictures)
    return graph.json()
