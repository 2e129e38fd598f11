"""`dtokd detect`: detectors, and objectives between them."""

import argparse
import itertools

import pytest
import torch
import transformers
from dtokd.detect.batch import Images
from dtokd.detect.build import _objective, share_queries
from dtokd.detect.cache import AbsentDetector
from dtokd.detect.data import collate
from dtokd.detect.detectors import deformable
from dtokd.detect.detectors.build import DENSE, check_directory, check_order, columns
from dtokd.detect.detectors.dense import Dense, make_backbone
from dtokd.detect.detectors.hf import KINDS, UNMASKED, HFDetector, load_folder
from dtokd.detect.matching import match_queries
from dtokd.errors import UsageError
from dtokd.objectives import detection as objectives
from dtokd.objectives.base import Objective
from dtokd.objectives.features import MultiScale
from dtokd.objectives.taps import Outputs
from dtokd.objectives.task import DistillationTask
from dtokd.objectives.teacher import Normalisation, Teacher
from dtokd.values import read_yaml
from safetensors.torch import save_file
from torchvision.models.detection import FCOS, RetinaNet
from transformers.models.deformable_detr.image_processing_deformable_detr import DeformableDetrImageProcessor

import dtokd_kernels as dk

from .coco import TINY

pytestmark = pytest.mark.usefixtures("one_thread")
KWARGS = {key: read_yaml(value) for key, value in (text.split("=") for text in TINY)}


def images(seed=0, size=(64, 96)):
    """Two, of which the second is padded on the right by a third."""
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, height, width, dtype=torch.bool)
    mask[1, :, width * 2 // 3 :] = False
    pixels = torch.rand(2, 3, height, width, generator=generator) * mask[:, None]
    return Images(pixels, mask, [(height, width), (height, width * 2 // 3)])


def targets():
    """The second image has no box."""
    two = {"boxes": torch.tensor([[5.0, 5, 30, 30], [40, 40, 60, 60]]), "labels": torch.tensor([0, 2])}
    return [two, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]


def dense(kind="fcos", width=32, seed=0):
    torch.manual_seed(seed)
    return Dense(kind, make_backbone("test_resnet", {}, None), 3, width=width)


def taught_by_fcos(folder):
    """The options of a teacher with weights of seed 7, which are written into the folder."""
    save_file(dense(seed=7).state_dict(), folder / "fcos.safetensors")
    teacher = ["--kd-model-name", "fcos:test_resnet", "--kd-model-kwargs", "width=32"]
    return [*teacher, "--kd-teacher-path", str(folder / "fcos.safetensors")]


def vidt(seed=0, **changes):
    torch.manual_seed(seed)
    return deformable.make("vidt_nano", 3, {**KWARGS, **changes})


# detectors


@pytest.mark.parametrize(("kind", "original"), [("fcos", FCOS), ("retinanet", RetinaNet)])
def test_dense_is_torchvisions(kind, original):
    """Losses, gradients' reach and detections, from the same weights on images that need no resize."""
    detector = dense(kind).train()
    # without BatchNorm's updates between the two passes
    detector.net.backbone.body.eval()
    pixels = images(size=(64, 64)).pixels
    whole = Images(pixels, torch.ones(2, 64, 64, dtype=torch.bool), [(64, 64)] * 2)
    net = original(
        detector.net.backbone, 3, min_size=64, max_size=64, score_thresh=0.05, detections_per_img=100,
        anchor_generator=detector.net.anchor_generator, image_mean=detector.mean.flatten().tolist(),
        image_std=detector.std.flatten().tolist(),
    )  # fmt: skip
    net.load_state_dict(detector.net.state_dict())
    net.train()
    net.backbone.body.eval()
    loss = detector.observe(whole, targets()).loss
    expected = net(list(pixels), targets())
    torch.testing.assert_close(loss, sum(expected.values()))
    detector.eval(), net.eval()
    with torch.no_grad():
        detector.net.score_thresh = net.score_thresh = 0.001
        for ours, theirs in zip(detector(whole).images, net(list(pixels)), strict=True):
            assert len(theirs["scores"]) == 100
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_swin_pyramid():
    """A timm backbone with channels last."""
    torch.manual_seed(0)
    body = make_backbone("swin_tiny_patch4_window7_224", {}, 64)
    detector = Dense("fcos", body, 2, width=32)
    outputs = detector.observe(images(size=(64, 64)))
    assert [m.shape[1:] for m in outputs.maps] == [(32, n, n) for n in (8, 4, 2, 1, 1)]


def backbone(**more):
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1] * 4}
    return {"use_timm_backbone": False, "use_pretrained_backbone": False} | {
        "backbone_config": transformers.ResNetConfig(**sizes, out_features=["stage4"], **more)
    }


def configuration(kind):
    """A small one of each kind."""
    shared = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 7, "num_labels": 3}
    shared |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    shared |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32)
    if kind == "yolos":
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "image_size": [64, 96]}
        return transformers.YolosConfig(hidden_size=32, **sizes, num_detection_tokens=7, num_labels=3)
    if kind in ("rt_detr", "rt_detr_v2", "d_fine"):
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1] * 4, "layer_type": "basic"}
        net = transformers.RTDetrResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
        name = {"rt_detr": "RTDetrConfig", "rt_detr_v2": "RTDetrV2Config", "d_fine": "DFineConfig"}[kind]
        shared |= {"encoder_hidden_dim": 32, "encoder_in_channels": [24, 32, 40], "decoder_in_channels": [32] * 3}
        return getattr(transformers, name)(backbone_config=net, num_denoising=4, **shared)
    name = {"detr": "Detr", "conditional_detr": "ConditionalDetr", "dab-detr": "DabDetr", "deformable_detr": None}[kind]
    if name is None:
        return vidt().net.config
    if kind == "dab-detr":
        shared["hidden_size"] = shared.pop("d_model")
    return getattr(transformers, f"{name}Config")(**backbone(), **shared)


@pytest.mark.parametrize("kind", KINDS)
def test_detr_family(kind, tmp_path):
    """From a checkpoint directory: outputs, a loss with a gradient, at most 100 boxes inside the image."""
    torch.manual_seed(0)
    net = transformers.AutoModelForObjectDetection.from_config(configuration(kind))
    net.save_pretrained(tmp_path)
    detector = load_folder(tmp_path, "--model")
    assert detector.kind == kind
    batch = images()
    outputs = detector.train().observe(batch, targets())
    loss = outputs.loss
    loss.backward()
    assert loss.isfinite()
    assert detector.probabilities(outputs).shape == (2, detector.queries, 3)
    assert outputs.boxes.shape == (2, detector.queries, 4)
    assert [m.shape[1] for m in outputs.maps] == detector.widths
    tokens = [t for t in (outputs.body, outputs.neck) if t is not None]
    assert tokens
    assert all(t.shape[-2:] == (detector.queries, detector.token_width) for t in tokens)
    with torch.no_grad():
        again = detector.eval().observe(batch)
        for size, found in zip(batch.sizes, detector.detect(again, batch).images, strict=True):
            assert len(found["scores"]) == min(100, 3 * detector.queries)
            assert (found["boxes"] >= 0).all()
            assert (found["boxes"] <= torch.tensor([size[1], size[0]] * 2)).all()


def test_detections_are_transformers(tmp_path):
    detector, batch = vidt().eval(), images()
    processor = DeformableDetrImageProcessor()
    with torch.no_grad():
        result = detector._run(batch)
        theirs = processor.post_process_object_detection(result, 0.0, torch.tensor(batch.sizes), top_k=30)
        ours = detector.detect(detector.observe(batch), batch).images
    for size, a, b in zip(batch.sizes, ours, theirs, strict=True):
        assert torch.equal(a["scores"], b["scores"])
        assert torch.equal(a["labels"], b["labels"])
        inside = torch.tensor([size[1], size[0]] * 2)
        torch.testing.assert_close(a["boxes"], torch.minimum(b["boxes"].clamp_min(0), inside))


@pytest.mark.parametrize(("size", "millions"), [("nano", 15.0), ("tiny", 36.6), ("small", 57.9), ("base", 96.6)])
def test_sizes(size, millions):
    """Parameters with 80 classes, and a step's gradients; ViDT's own have 16, 38, 61 and 100 million."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    detector = deformable.make(f"vidt_{size}", 80, {})
    assert sum(p.numel() for p in detector.parameters()) == pytest.approx(millions * 1e6, rel=0.01)
    assert (detector.queries, len(detector.widths), detector.token_width) == (100, 4, 256)
    outputs = detector.observe(images(), targets())
    loss = outputs.loss
    loss.backward()
    assert loss.isfinite()
    assert next(detector.net.model.backbone.parameters()).grad.any()
    assert outputs.logits.shape == (2, 100, 80)


def unequal():
    """Images of sizes of their own: the first two have the same padding alone."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(50, 64), (64, 40), (40, 90), (96, 64)]
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def collated(pixels):
    return collate([(p, {"boxes": torch.zeros(0, 4)}) for p in pixels])[0]


@pytest.mark.parametrize("kind", ["fcos", "retinanet", "vidt", "vidt with encoder", *KINDS])
def test_padding_does_not_change_what_is_found(kind):
    """An image alone and beside larger ones, in every detector; other batches round differently."""
    if kind in DENSE:
        detector = dense(kind)
        detector.net.score_thresh = 0.0
    elif kind.startswith("vidt"):
        detector = vidt(encoder_layers=int("with" in kind))
    else:
        torch.manual_seed(0)
        detector = HFDetector(transformers.AutoModelForObjectDetection.from_config(configuration(kind)))
    detector.eval()
    pixels = unequal()
    with torch.no_grad():
        together = detector(collated(pixels)).images
        for image, found in zip(pixels, together, strict=True):
            (alone,) = detector(collated([image])).images
            torch.testing.assert_close(found["scores"], alone["scores"], rtol=1e-4, atol=1e-6)
            assert in_both(found, alone) >= 0.97 * len(alone["scores"])


def in_both(found, alone):
    """How many boxes are in both, with their class and score; equal scores may have changed places."""
    rows = [torch.cat([f["boxes"], 100 * f["labels"][:, None], 100 * f["scores"][:, None]], 1) for f in (found, alone)]
    return int((torch.cdist(*rows, p=torch.inf).amin(0) < 1e-2).sum())


def test_images_are_padded_as_alone():
    batch = collated(unequal())
    assert batch.pixels.shape == (4, 3, 96, 96)
    parts = list(batch.alike())
    assert [numbers for numbers, _ in parts] == [[0, 1], [2], [3]]
    assert [tuple(part.pixels.shape) for _, part in parts] == [(2, 3, 64, 64), (1, 3, 64, 96), (1, 3, 96, 64)]
    for numbers, part in parts:
        assert part.sizes == [batch.sizes[n] for n in numbers]
        for n, pixels, mask in zip(numbers, part.pixels, part.mask, strict=True):
            alone = collated([unequal()[n]])
            assert torch.equal(pixels, alone.pixels[0])
            assert torch.equal(mask, alone.mask[0])


@pytest.mark.parametrize("kind", UNMASKED)
def test_boxes_beside_padding_that_is_not_seen(kind):
    """To these detectors a padded image is a whole one, and so is what they learn and find in pixels."""
    torch.manual_seed(0)
    detector = HFDetector(transformers.AutoModelForObjectDetection.from_config(configuration(kind)))
    padded = collated([torch.rand(3, 40, 50)])
    pixels = torch.where(padded.mask[:, None], padded.pixels, detector.mean)
    whole = Images(pixels, torch.ones_like(padded.mask), [(64, 64)])
    learned = [{"boxes": torch.tensor([[5.0, 6.0, 30.0, 35.0]]), "labels": torch.tensor([1])}]
    seen = []
    for images in (padded, whole):
        torch.manual_seed(1)  # of the denoising
        outputs = detector.train().observe(images, learned)
        height, width = images.sizes[0]
        seen.append((outputs.loss, outputs.boxes * torch.tensor([width, height] * 2)))
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-3)


def test_class_names(tmp_path):
    net = transformers.AutoModelForObjectDetection.from_config(configuration("detr"))
    net.config.id2label = {0: "N/A", 1: "Person", 2: "cat"}
    detector = HFDetector(net)
    assert columns(detector, ["cat", "person"]).tolist() == [2, 1]
    assert columns(detector, ["cat", "dog"]) is None
    assert columns(vidt(), ["a", "b", "c"]).tolist() == [0, 1, 2]
    for others in (["n/a", "person", "cat"], ["n/a", "person", "dog"]):
        check_order(detector, others, "x")
    check_order(vidt(), ["a", "b", "c"], "vidt_nano")
    with pytest.raises(UsageError, match="class 1 is 'cat' in the data, but 'person' in x"):
        check_order(detector, ["n/a", "cat", "person"], "x")
    with pytest.raises(UsageError, match="is no checkpoint of transformers"):
        load_folder(tmp_path, "--kd-model-name")
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="holds a bert; known are"):
        load_folder(tmp_path, "--kd-model-name")


# matching and objectives


def boxes(n, seed):
    generator = torch.Generator().manual_seed(seed)
    centre, size = torch.rand(2, n, 2, generator=generator), torch.rand(2, n, 2, generator=generator) * 0.5 + 0.1
    return torch.cat([centre, size], -1)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 5), (5, 3)])
def test_matching_is_the_best_of_all(n, m):
    """Against all assignments, cost by cost."""
    from torchvision.ops import box_convert, generalized_box_iou

    student = boxes(n, 0), torch.rand(2, n, 3)
    teacher = boxes(m, 1), torch.rand(2, m, 3)
    own, theirs = match_queries(student, teacher)
    assert own.shape == theirs.shape == (2, min(n, m))
    for b in range(2):
        corners = [box_convert(x[0][b], "cxcywh", "xyxy") for x in (student, teacher)]
        cost = 5 * torch.cdist(student[0][b], teacher[0][b], p=1) - 2 * generalized_box_iou(*corners)
        cost += 2 * torch.cdist(student[1][b], teacher[1][b], p=1).clamp_max(1)
        short, long = sorted((n, m))
        table = cost if n <= m else cost.T
        best = min(sum(float(table[i, p[i]]) for i in range(short)) for p in itertools.permutations(range(long), short))
        assert float(cost[own[b], theirs[b]].sum()) == pytest.approx(best, rel=1e-5)


def shuffled(outputs, order):
    """The same outputs with queries in another order."""
    return outputs._replace(
        logits=outputs.logits[:, order],
        boxes=outputs.boxes[:, order],
        body=outputs.body[:, order],
        neck=outputs.neck[:, :, order],
    )


@pytest.fixture(scope="module")
def seen():
    with torch.no_grad():
        return vidt().eval().observe(images())


#: Four levels on both sides.
ALL = (tuple(range(4)), tuple(range(4)))
TOKEN_VARIANTS = list(itertools.product(["norm", "smooth_l1", "mse", "cosine"], ["none", "standardize"], [False, True]))


@pytest.mark.parametrize(("distance", "norm", "root"), TOKEN_VARIANTS)
def test_tokens_of_equal_detectors(seen, distance, norm, root):
    """0 with a finite gradient, whatever the order of the teacher's queries; by index another order costs."""
    objective = objectives.Tokens("token", "linear", ALL, ([32] * 4, [32] * 4), (32, 32), norm, distance, root)
    maps = tuple(m.clone().requires_grad_() for m in seen.maps)
    student = seen._replace(maps=maps, body=seen.body.clone().requires_grad_())
    order = torch.randperm(10)
    teacher = shuffled(seen, order)
    pairs = match_queries((seen.boxes, seen.logits.sigmoid()), (teacher.boxes, teacher.logits.sigmoid()))
    assert torch.equal(order[pairs[1][0]], pairs[0][0])
    head = objective.head(student)
    loss = objective.loss(student, head.of_queries(pairs[0]), teacher.of_queries(pairs[1]), None)
    assert 0 <= loss.item() < (2e-3 if root else 1e-5)  # the root of what float32 leaves
    loss.backward()
    assert all(t.grad.isfinite().all() for t in (*maps, student.body))
    by_index = objective.loss(student, objective.head(student), teacher, None)
    assert by_index.item() > 50 * loss.item()


def test_tokens_are_vidts():
    """The formula, term by term, and its root."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def outputs():
        maps = (random(2, 8, 4, 4), random(2, 8, 2, 2))
        return Outputs(random(2, 5, 3), boxes=random(2, 5, 4), maps=maps, body=random(2, 5, 8), neck=random(2, 3, 5, 8))

    s, t = outputs(), outputs()
    expected = sum((a - b).norm(dim=1).mean() for a, b in zip(s.maps, t.maps, strict=True))
    expected = expected + (s.body - t.body).norm(dim=-1).mean() + 3 * (s.neck - t.neck).norm(dim=-1).mean()
    for root in (False, True):
        objective = objectives.Tokens(
            "token", "linear", ((0, 1), (0, 1)), ([8] * 2, [8] * 2), (8, 8), "none", "norm", root
        )
        loss = objective.loss(s, objective.head(s), t, None)
        torch.testing.assert_close(loss, expected.sqrt() if root else expected)


@pytest.mark.parametrize("projector", ["linear", "orthogonal"])
def test_tokens_of_other_widths(projector):
    """Another width, fewer levels, other grids, more layers and queries on the teacher's side."""
    student, batch = vidt(), images()
    config = configuration("rt_detr_v2")
    torch.manual_seed(1)
    for key, value in {"num_queries": 12, "decoder_layers": 3}.items():
        setattr(config, key, value)
    teacher = HFDetector(transformers.AutoModelForObjectDetection.from_config(config)).eval()
    with torch.no_grad():
        taught = teacher.observe(batch)
    outputs = student.observe(batch, targets())
    stages, widths = ((1, 2, 3), (0, 1, 2)), (student.widths[-3:], teacher.widths)
    both = (student.token_width, teacher.token_width)
    objective = objectives.Tokens("token", projector, stages, widths, both, "standardize", "smooth_l1", False)
    pairs = match_queries((outputs.boxes, None), (taught.boxes, None))
    assert pairs[0].shape == (2, 10)
    head = objective.head(outputs.of_stages(stages[0]))
    loss = objective.loss(outputs, head.of_queries(pairs[0]), taught.of_queries(pairs[1]), None)
    loss.backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in student.parameters()) > 30
    if projector == "orthogonal":
        assert all(p.grad is not None for p in objective.head.parameters())


def test_bernoulli_kl():
    a, b = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(logits=b), torch.distributions.Bernoulli(logits=a)
    )
    torch.testing.assert_close(objectives.bernoulli_kl(a, b), expected)
    far = torch.tensor([80.0, -80.0], requires_grad=True)
    objectives.bernoulli_kl(far, torch.tensor([-80.0, -80.0])).sum().backward()
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["fcos", "vidt"])
def test_predictions(kind):
    """0 for equal detectors; a student that follows its gradient nears the teacher."""
    make = vidt if kind == "vidt" else lambda seed=0: dense(kind, seed=seed)
    student, teacher, batch = make(0).eval(), make(1).eval(), images()
    objective = objectives.Predictions("prediction", kind != "vidt", torch.arange(3))
    with torch.no_grad():
        taught = teacher.observe(batch)
        own = student.observe(batch)
        assert objective.loss(own, None, own, None).abs() < 1e-6
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    values = []
    for _ in range(8):
        loss = objective.loss(student.observe(batch), None, taught, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert min(values) < 0.92 * values[0]


def test_dense_features():
    student, teacher, batch = dense(width=32), dense(width=64, seed=1).eval(), images()
    objective = MultiScale("feature", "linear", (tuple(range(5)),) * 2, ([32] * 5, [64] * 5), "standardize", "mse")
    outputs = student.observe(batch)
    with torch.no_grad():
        taught = teacher.observe(batch)
    loss = objective.loss(outputs, objective.head(outputs), taught, None)
    loss.backward()
    assert 0.1 < loss.item() < 4  # of standardised values: 2 where they have nothing to do with each other
    assert all(p.grad.any() for p in objective.head.maps[0].parameters() if p.ndim == 2)


class Negative(Objective):
    """A loss without a lower bound."""

    name = "negative"

    def loss(self, student, projected, teacher, target):
        return -student.logits.square().mean() - 1


def test_negative_loss_reaches_the_balance():
    """And is no constant with weight 0."""
    task = DistillationTask(dense(), None, [(Teacher(dense(seed=1), "fcos", Normalisation()), [Negative()])])
    losses = task(images(), targets())["objectives"]
    assert losses["negative"] < -1
    with pytest.raises(ValueError, match=r"losses\['negative'\] is -.*need a positive loss"):
        dk.backward(losses, task.get_eval_model().parameters())


def test_a_directory_holds_the_whole_detector(tmp_path):
    """What would change it is refused, as it has no effect."""
    check_directory(str(tmp_path), {"--pretrained": False, "--model-kwargs": {}})
    check_directory("vidt_nano", {"--model-kwargs": {"num_queries": 9}})
    with pytest.raises(UsageError, match="--freeze-bn: no effect on the checkpoint directory"):
        check_directory(str(tmp_path), {"--pretrained": False, "--freeze-bn": True})


def test_boxes_of_two_kinds_are_not_compared():
    """RetinaNet has nine at a place, FCOS one, in another code; a cache that does not know the kind is believed."""
    student, teacher = dense("fcos"), dense("retinanet")
    options = argparse.Namespace(kd_feature_norm="none", kd_projector="linear", kd_feature_loss="mse", model="fcos:x")
    asked = options, student, teacher, "retinanet:x", torch.arange(3)
    assert isinstance(_objective("feature", *asked), MultiScale)
    with pytest.raises(UsageError, match="write boxes in different ways"):
        _objective("prediction", *asked)
    facts = {
        name: getattr(student, name) for name in ("dense", "queries", "sigmoid", "classes", "widths", "token_width")
    }
    absent = AbsentDetector({**facts, "columns": [0, 1, 2]})
    assert isinstance(
        _objective("prediction", options, student, absent, "fcos:x", absent.columns), objectives.Predictions
    )


def test_predictions_do_not_round_below_zero():
    """Detectors that agree but for the last bits: the divergences round to either side of 0."""
    objective = objectives.Predictions("prediction", True, torch.arange(3))
    values = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, 10, 3, generator=generator)
        near = logits * (1 + 1e-6 * torch.randn(2, 10, 3, generator=generator))
        boxes = torch.rand(2, 10, 4, generator=generator)
        values.append(objective.loss(Outputs(near, boxes=boxes), None, Outputs(logits, boxes=boxes), None))
    assert min(values) == 0


def test_shared_queries():
    student, teacher = vidt(0), vidt(1, backbone_embed_dim=24)
    share_queries(student, teacher)
    for name in ("query_position_embeddings", "reference_points"):
        assert torch.equal(getattr(student.net.model, name).weight, getattr(teacher.net.model, name).weight)
    with pytest.raises(UsageError, match="--kd-share-queries"):
        share_queries(student, vidt(1, num_queries=11))
    with pytest.raises(UsageError, match="--kd-share-queries"):
        share_queries(dense(), dense())


def test_of_queries():
    """Image by image, along the queries' dimension of each tensor."""
    index = torch.tensor([[2], [0]])
    tokens, neck = torch.arange(24).view(2, 3, 4), torch.arange(48).view(2, 2, 3, 4)
    picked = Outputs(tokens, boxes=tokens + 1, body=tokens + 2, neck=neck).of_queries(index)
    expected = torch.stack([tokens[0, 2], tokens[1, 0]])
    for plus, tensor in enumerate((picked.logits, picked.boxes, picked.body)):
        assert torch.equal(tensor[:, 0], expected + plus)
    assert torch.equal(picked.neck[:, :, 0], torch.stack([neck[0, :, 2], neck[1, :, 0]]))
