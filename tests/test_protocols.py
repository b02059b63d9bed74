"Published lists typed by hand, in every order and with every fault; every kind of protocol from its list to its figures, with tiny fresh models."
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from avnb import measures
from avnb.catalogues import Entry
from avnb.duals import DualEncoder, film_encoder, mel_encoder
from avnb.embedders import DenseEmbedder, Embedder, FolderEmbedder, embedder, save_embeddings
from avnb.encoders import audio_encoder, image_encoder
from avnb.masks import SIDE
from avnb.media import write_video
from avnb.metrics import avs_each, avs_figures, avs_told, iiou_figures, localisation_figures, segmentation_figures
from avnb.mlp import MLPConfig
from avnb.models import DenseAligner
from avnb.protocols import PROTOCOLS, Protocol, evaluate, protocols_table, read_listing
from avnb.tasks import make_hear_task, write_wav


@dataclass
class List:
    "A published list: how a row is written, which files it needs, and rows that cannot be read."
    protocol: str
    file: str          # its name
    row: object        # i -> row
    media: object      # i -> files
    bad: list
    head: str = ""
    more: dict = field(default_factory=dict)   # i -> {other file of the list: text}
    always: dict = field(default_factory=dict) # {other file of the list: text}
    questions: int = 1

    def write(self, folder: Path, rows: list, ids) -> Path:
        text = json.dumps({"data": rows} if self.protocol not in ("vggss", "is3") else rows) if self.file.endswith("json") else self.head + "".join(f"{r}\n" for r in rows)
        files = {**self.always, **{k: v for i in ids for k, v in (self.more(i) if self.more else {}).items()}, self.file: text}
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        return folder / Path(self.file).parts[0] if self.protocol == "lvu" else folder


def frames_of(i, kind, mp4=""): return [f"{kind}/{i}/{i}{mp4}_{k}.png" for k in range(1, 6)]
def annotation(i): return {f"Annotations/{i}.xml": "<annotation><a1><bbox><id>1</id><xmin>0</xmin><ymin>0</ymin><xmax>128</xmax><ymax>64</ymax></bbox></a1></annotation>"}


BOX = [[0, 0, .5, .5]]
LISTS = [
    List("vggsound", "vggsound.csv", lambda i: f"c{i},{i},class {i},test", lambda i: [f"c{i}_{i:06d}.mp4"], ["c,abc,dog,test", "c,1,dog", '"c,1,dog,test', "../c,1,dog,test", "c,1,dog,dev", ",1,dog,test", "c,-1,dog,test", "c,1.5,dog,test"]),
    List("vggsound", "vgg_test_5_per_class_for_retrieval_cleaned.json", lambda i: {"video_id": f"c{i}", "labels": "vgg_1", "wav": "/data/x.wav", "video_path": "/data"}, lambda i: [f"frame_5/c{i}.jpg", f"{i}/c{i}.flac"],
         [7, {}, {"video_id": "x"}, {"video_id": "/etc/passwd", "labels": "a"}, {"video_id": 3, "labels": "a"}, {"video_id": "a/../../b", "labels": "a"}]),
    List("audioset", "eval_segments.csv", lambda i: f'c{i}, {i}.000, {i + 10}.000, "/m/{i},/t/{i}"', lambda i: [f"c{i}_{1000*i}_{1000*i + 10000}.wav", f"frame_5/c{i}.jpg"], ['c, 9.0, 1.0, "/m/1"', 'c, x, 1.0, "/m/1"', "c, 0.0, 10.0", 'c, 0.0, 10.0, "/m/1'],
         head="# Segments csv\n# YTID, start_seconds, end_seconds, positive_labels\n"),
    List("places", "val.json", lambda i: {"wav": f"wavs/1/u{i}.wav", "image": f"a/abbey/g{i}.jpg"}, lambda i: [f"places/wavs/1/u{i}.wav", f"images/a/abbey/g{i}.jpg"], [None, {"wav": "x.wav"}, {"wav": "../x.wav", "image": "g.jpg"}, {"wav": [], "image": "g.jpg"}]),
    List("vggss", "vggss.json", lambda i: {"file": f"c{i}", "class": "dog", "bbox": BOX}, lambda i: [f"frames/c{i}.jpg", f"audio/c{i}.wav"],
         ["x", {"file": "x", "class": "dog", "bbox": []}, {"file": "x", "class": "dog", "bbox": [[0, 0, 0, 1]]}, {"file": "x", "class": "dog", "bbox": [["a", 0, 1, 1]]}, {"file": "..", "class": "dog", "bbox": BOX}]),
    List("is3", "IS3_annotation.json", lambda i: {"image": f"/x/cat_bus_{i//2}_{i}.jpg", "audio": f"/x/cat_bus_{i//2}_{i}.wav", "gt_box": [0, 0, 112, 224]}, lambda i: [f"images/cat_bus_{i//2}_{i}.jpg", f"audio_waw/cat_bus_{i//2}_{i}.wav"],
         ["x", {"image": "cat.jpg", "audio": "cat.wav", "gt_box": [0, 0, 1, 1]}, {"image": "a_b.jpg", "audio": "a_b.wav", "gt_box": [1, 0, 1, 1]}, {"image": "a_b.jpg", "audio": "..", "gt_box": [0, 0, 1, 1]}, {"image": "a_b.jpg", "audio": "a_b.wav"}]),
    List("flickr_soundnet", "flickr_test.csv", lambda i: f"{i},202", lambda i: [f"Data/{i}.jpg", f"Data/{i}.wav"], ["../1,0", "777,0", "778,0", "779,0"], more=annotation,
         always={"Annotations/778.xml": "<annotation/>", "Annotations/779.xml": "<annotation>"}),
    List("avsbench_s4", "s4_meta_data.csv", lambda i: f"f{i},0,dog,test", lambda i: [*frames_of(f"f{i}", "visual_frames/test/dog"), *frames_of(f"f{i}", "gt_masks/test/dog"), f"audio_wav/test/dog/f{i}.wav"], ["f,0,dog", "f,0,,test", ",0,dog,test", "f,0,dog,dev", "../f,0,dog,test"],
         head="name,start,category,split\n", questions=5),
    List("avsbench_ms3", "ms3_meta_data.csv", lambda i: f"f{i},test", lambda i: [*frames_of(f"f{i}", "visual_frames", ".mp4"), *frames_of(f"f{i}", "gt_masks/test"), f"audio_wav/test/f{i}.wav"], ["f", ",test", "f,dev", "/f,test"], head="name,split\n", questions=5),
    List("ade_speech", "prompted_segmentation.csv", lambda i: f'val/a{i}.jpg,3{i},x/dog{i}.wav,"[0, 1]"', lambda i: [f"frames/val/a{i}.jpg", f"annotations/val/a{i}_seg.png", f"audio/dog{i}.wav"],
         ["val/x.jpg,y,dog.wav,", "val/x.jpg,3,dog.wav,soon", 'val/x.jpg,3,dog.wav,"[2, 1]"', "../x.jpg,3,dog.wav,", ",3,dog.wav,", "val/x.jpg,3", "val/x.jpg,3,dog.wav,7"], head="image_location,ade_class_id,speech_prompt_file,timing\n"),
    List("ade_sound", "prompted_segmentation.csv", lambda i: f"val/a{i}.jpg,3{i},vgg/s{i}.wav", lambda i: [f"frames/val/a{i}.jpg", f"annotations/val/a{i}_seg.png", f"audio/s{i}.wav"], ["val/x.jpg,-1,s.wav", "val/x.jpg,1.5,s.wav", "val/x.jpg,nan,s.wav"], head="image_location,ade_class_id,vggsound_file\n"),
    List("ucf101", "trainlist01.txt", lambda i: f"Archery/v{i}.avi 1", lambda i: [f"UCF-101/Archery/v{i}.mp4"], ["Archery/x.avi 2", "Surfing/x.avi 1", "x.avi 1", "Archery/x.avi", "Archery/../../x.avi 1"], always={"classInd.txt": "1 Archery\n2 YoYo\n"}),
    List("hmdb51", "wave_test_split1.txt", lambda i: f"v {i}.avi 1 ", lambda i: [f"hmdb/wave/v {i}.avi"], ["x.avi", "x.avi 3", "x.avi one", "../x.avi 1", " 1"]),
    List("esc50", "meta/esc50.csv", lambda i: f"{i}-A.wav,1,dog", lambda i: [f"audio/{i}-A.wav"], ["x.wav,6,dog", "x.wav,,dog", ",1,dog", "x.wav,1,", "/x.wav,1,dog", "x.wav,1", "x.wav,1,dog,more"], head="filename,fold,category\n"),
    List("lvu", "scene/train.csv", lambda i: f"{i % 3} office c{i} u", lambda i: [f"c{i}.mp4"], ["x", "a office c u", "1 office ../c u", "1.5 office c u"], head="scene name videoid url\n", always={"scene/val.csv": "h\n", "scene/test.csv": "h\n"}),
    List("lvu", "like_ratio/train.csv", lambda i: f"{i} 5 x c{i} u", lambda i: [f"c{i}.mkv"], ["0 0 x c u", "1 y x c u", "inf 1 x c u", "-1 2 x c u"], head="likes dislikes x videoid url\n", always={"like_ratio/val.csv": "h\n", "like_ratio/test.csv": "h\n"}),
]


def touch(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


@pytest.mark.quick
@pytest.mark.parametrize("of", LISTS, ids=lambda x: f"{x.protocol}-{Path(x.file).suffix[1:]}-{Path(x.file).parts[0]}")
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_row_is_of_one_sort(of, tmp_path_factory, data):
    "Rows in any order: those with media, without, several times, and unreadable ones."
    top = tmp_path_factory.mktemp("list")
    ids = data.draw(st.lists(st.integers(1, 6), max_size=9))
    bad = data.draw(st.lists(st.sampled_from(range(len(of.bad))), max_size=4))
    here = {i for i in ids if i % 2}
    (top / "media").mkdir()
    for i in here: touch(top / "media", of.media(i))
    if ids: touch(top / "media", of.media(2)[:-1]) # a row whose last file is missing
    rows = data.draw(st.permutations([("row", i) for i in ids] + [("bad", k) for k in bad]))
    lists = of.write(top / "lists", [of.row(n) if kind == "row" else of.bad[n] for kind, n in rows], set(ids))
    found = PROTOCOLS[of.protocol].reader(lists, top / "media")
    assert found.n_listed == len(rows) == found.n_found + len(found.missing) + len(found.doubled) + len(found.malformed)
    assert (found.n_found, len(found.missing), len(found.malformed)) == (len(here), len(set(ids) - here), len(bad))
    assert len(found.items) == of.questions * len(here) == len({e.id for e in found.items})
    for e in found.items:
        for path in (e.picture, e.sound, e.mask):
            assert path is None or path.is_file() and (top / "media").resolve() in path.resolve().parents
    number = found.n_listed and found.coverage()
    assert not number or f"{len(here):,} of {len(rows):,} rows" in number
    if not of.file.endswith("json"):
        at = {int(where.rsplit(":", 1)[1]) for where, _ in found.malformed}
        lead = of.head.count("\n")
        assert at == {n + 1 + lead for n, (kind, _) in enumerate(rows) if kind == "bad"}


@pytest.mark.quick
def test_a_link_never_leads_out(tmp_path):
    touch(tmp_path, ["away/1-A.wav", "media/deep/2-A.wav"])
    (tmp_path / "media/1-A.wav").symlink_to(tmp_path / "away/1-A.wav")
    (tmp_path / "media/3-A.wav").symlink_to("deep/2-A.wav")
    (tmp_path / "media/more").symlink_to(tmp_path / "away")
    (tmp_path / "shelf").symlink_to(tmp_path / "media") # the folder itself may be one
    (tmp_path / "esc50.csv").write_text("filename,fold,category\n1-A.wav,1,dog\n2-A.wav,2,dog\n3-A.wav,3,dog\nmore/1-A.wav,4,dog\n")
    found = read_listing("esc50", tmp_path, tmp_path / "shelf")
    assert [e.id for e in found.items] == ["2-A.wav", "3-A.wav"] and len(found.missing) == 2 and "link leads out" in found.missing[0][1] and "not searched: more" in found.missing[1][1]


@pytest.mark.quick
def test_another_file_is_named(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "vggss.json").write_text("{]")
    with pytest.raises(ValueError, match="no JSON"): read_listing("vggss", tmp_path, tmp_path / "media")
    (tmp_path / "vggss.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="needed a list"): read_listing("vggss", tmp_path, tmp_path / "media")
    (tmp_path / "esc50.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="needed columns filename"): read_listing("esc50", tmp_path, tmp_path / "media")
    for name, p in PROTOCOLS.items():
        if name not in ("vggss", "esc50", "lvu"):
            with pytest.raises(FileNotFoundError): p.reader(tmp_path / "media", tmp_path / "media")
    with pytest.raises(FileNotFoundError, match="no such folder"): read_listing("esc50", tmp_path, tmp_path / "nowhere")


@pytest.mark.quick
def test_the_table_says_what_there_is_to_know():
    table = protocols_table()
    for name, p in PROTOCOLS.items():
        assert f"-p protocol {name} " in table.loc[name, "command"] and table.loc[name, "list"]
        assert not p.published or "Check before citing" in table.loc[name, "published"]
        assert all(0 < v < 1 for systems in p.published.values() for v in systems.values())


# Every kind of protocol, from its list to its figures

def dense_model(heads=2):
    torch.manual_seed(0)
    return DenseAligner(audio_encoder("toy"), image_encoder("toy"), dim=16, head="centred", heads=heads)


def dual_model():
    torch.manual_seed(0)
    return DualEncoder(film_encoder("toy"), mel_encoder("toy"))


def film(path, seed, seconds=1., hz=10):
    draw = torch.Generator().manual_seed(seed)
    still = torch.randint(0, 255, (1, 3, 6, 8), generator=draw).repeat_interleave(8, 2).repeat_interleave(8, 3)
    n = round(seconds * hz)
    t = torch.arange(round(seconds * 48_000)) / 48_000
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, (still + 3*torch.arange(n)[:, None, None, None]).clamp(max=255).to(torch.uint8), hz, {"en": .3*torch.sin(6.28*(200 + 90*seed)*t)})


def tone(path, seed, seconds=.5): write_wav(path, .3*np.sin(np.arange(round(16_000*seconds))*(.03 + .02*seed)), 16_000)


def image(path, seed, size=(48, 40), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST).convert(mode).save(path)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    top = tmp_path_factory.mktemp("clips")
    for n in range(4): film(top / f"media/c{n}_00000{n}.mp4", n)
    (top / "media/c9_000009.mp4").write_bytes(b"no film at all")
    (top / "vggsound.csv").write_text("".join(f"c{n},{n},{'dog' if n % 2 else 'cat'},test\n" for n in (0, 1, 2, 3, 3, 8, 9)) + "torn\n")
    return top


@pytest.mark.parametrize("model", (dense_model, dual_model))
@pytest.mark.parametrize("protocol", ("vggsound", "vggsound_sync"))
def test_retrieval_end_to_end(clips, model, protocol):
    told = evaluate(replace(PROTOCOLS[protocol], parts=PROTOCOLS[protocol].parts and min(PROTOCOLS[protocol].parts, 3)), model(), clips, clips / "media", limit=5)
    for way in ("a2v", "v2a"):
        r = told["metrics"][f"{way}/R@1"]
        assert r["n"] == 4 and 0 <= r["lo"] <= r["value"] <= r["hi"] <= 1 and told["metrics"][f"{way}/R@5"]["value"] == 1 and told["baselines"]["random"][f"{way}/R@1"]["value"] == .25
        assert f"{way}/class_mAP" in told["metrics"]
    assert [row["id"] for row in told["items"]] == [f"c{n}_00000{n}" for n in range(4)]
    assert "5 of 8 rows" in told["coverage"] and "1 could not be used: c9_000009" in told["coverage"] and "1 doubled" in told["coverage"] and "vggsound.csv:8" in told["coverage"]


def test_a_killed_evaluation_goes_on(clips, tmp_path, monkeypatch):
    "Only what was in hand is done again, and the figures are those of an evaluation that nobody killed."
    whole, calls, made = evaluate("vggsound", dense_model(), clips, clips / "media"), [], DenseEmbedder._common
    def counted(self, e, kind, parts):
        calls.append((e.id, kind))
        if len(calls) == 4: raise KeyboardInterrupt
        return made(self, e, kind, parts)
    monkeypatch.setattr(DenseEmbedder, "_common", counted)
    with pytest.raises(KeyboardInterrupt): evaluate("vggsound", dense_model(), clips, clips / "media", tmp_path)
    again = evaluate("vggsound", dense_model(), clips, clips / "media", tmp_path)
    assert again == whole
    asked = [c for c in calls if c[0] != "c9_000009"]
    assert len(asked) == 9 and asked.count(calls[3]) == 2 and len(set(asked)) == 8
    evaluate("vggsound", dense_model(), clips, clips / "media", tmp_path)
    assert len([c for c in calls if c[0] != "c9_000009"]) == 9
    other = dense_model()
    with torch.no_grad(): other.audio_head.linear.weight.mul_(1.5)
    evaluate("vggsound", other, clips, clips / "media", tmp_path) # other weights are another model
    assert len([c for c in calls if c[0] != "c9_000009"]) == 17


def test_localisation_end_to_end(tmp_path):
    for n in range(3): image(tmp_path / f"media/frames/c{n}.jpg", n); tone(tmp_path / f"media/audio/c{n}.wav", n)
    film(tmp_path / "media/c3.mp4", 3)
    (tmp_path / "vggss.json").write_text(json.dumps([{"file": f"c{n}", "class": f"k{n % 2}", "bbox": [[.1, .1, .3 + .1*n, .6]]} for n in range(5)]))
    told = evaluate("vggss", dense_model(), tmp_path, tmp_path / "media")
    assert set(told["metrics"]) == {"cIoU", "AUC", "cIoU_mean", "pointing", "adaptive_cIoU", "adaptive_AUC", "area_iou"} and told["metrics"]["cIoU"]["n"] == 4
    assert set(told["baselines"]) == {"everything", "centre", "saliency", "random", "shuffled"} and "4 of 5 rows" in told["coverage"]
    with pytest.raises(ValueError, match="no places"): evaluate("vggss", dual_model(), tmp_path, tmp_path / "media")
    flickr = tmp_path / "flickr"
    flickr.mkdir()
    (flickr / "flickr_test.csv").write_text("0,1\n1,1\n")
    (flickr / "Annotations").mkdir()
    for n in range(2):
        for name, text in annotation(n).items(): (flickr / name).write_text(text.replace("</annotation>", text[12:]))
        image(tmp_path / f"photos/{n}.jpg", n); tone(tmp_path / f"photos/{n}.wav", n)
    heat = np.zeros((2, 8, 8)); heat[:, :2, :4] = 1
    own = evaluate("flickr_soundnet", save_embeddings(tmp_path / "own", ["0", "1"], heat=heat), flickr, tmp_path / "photos")
    assert set(own["metrics"]) == {"cIoU", "AUC", "cIoU_mean", "pointing", "area_iou"}
    assert own["metrics"]["cIoU"]["value"] == own["metrics"]["pointing"]["value"] == 1 and own["metrics"]["cIoU_mean"]["value"] > .7 > own["baselines"]["everything"]["cIoU_mean"]["value"]


def test_two_things_in_a_picture_must_both_be_found(tmp_path):
    "IS3's figures are those of maps put together by picture; a picture with one thing left is not counted."
    names = [f"cat_bus_{n}_{x}" for n in range(3) for x in ("cat", "bus")][:-1]
    boxes = {name: [0, 0, 112, 224] if name.endswith("cat") else [112, 0, 224, 224] for name in names}
    for n, name in enumerate(names): image(tmp_path / f"media/images/{name}.jpg", n, (64, 64)); tone(tmp_path / f"media/audio_wav/{name}.wav", n)
    (tmp_path / "IS3_annotation.json").write_text(json.dumps([{"image": f"{n}.jpg", "audio": f"{n}.wav", "gt_box": boxes[n]} for n in names]))
    heat = np.random.default_rng(0).random((5, 8, 8))
    heat[0, :, :4] += 1; heat[1, :, 4:] += 1; heat[2, :, :4] += 1   # both right; one right
    told = evaluate("is3", save_embeddings(tmp_path / "own", names, heat=heat), tmp_path, tmp_path / "media")
    m = {k: v["value"] for k, v in told["metrics"].items()}
    assert m["IIoU"] == .5 and m["adaptive_IIoU"] == .5 and m["cIoU"] >= .6 and told["metrics"]["IIoU"]["n"] == 2 and told["metrics"]["cIoU"]["n"] == 5 and "1 have no partner, and no part in IIoU: cat_bus_2_cat" in told["coverage"]
    at = lambda x: torch.nn.functional.interpolate(torch.tensor(x)[None].float(), size=(224, 224), mode="bilinear")[0].view(2, 2, 224, 224)
    truth = torch.zeros(2, 2, 224, 224); truth[:, 0, :, :112] = 1; truth[:, 1, :, 112:] = 1
    whole = iiou_figures(at(heat[:4]), truth)
    assert all(abs(m[k] - whole[k]["value"]) < 2e-3 for k in ("IIoU", "IAUC", "IIoU_mean"))
    assert told["baselines"]["everything"]["IIoU_mean"]["value"] == .5 and {"IIoU", "adaptive_IAUC"} <= set(told["baselines"]["saliency"])


def test_avsbench_end_to_end(tmp_path):
    data = tmp_path / "s4_data"
    for f, c in (("f0", "dog"), ("f1", "cat")):
        tone(data / f"audio_wav/test/{c}/{f}.wav", len(c + f), 4.5)
        for k in range(1, 6):
            image(data / f"visual_frames/test/{c}/{f}/{f}_{k}.png", k)
            mask = np.zeros((40, 48), np.uint8); mask[10:30, 10:30] = 255*(k != 5 or f == "f0")
            (data / f"gt_masks/test/{c}/{f}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(data / f"gt_masks/test/{c}/{f}/{f}_{k}.png")
    (tmp_path / "s4_meta_data.csv").write_text("name,start,category,split\nf0,0,dog,test\nf1,0,cat,test\nf2,0,cat,train\n")
    told = evaluate("avsbench_s4", dense_model(), tmp_path, data)
    assert {"M_J", "M_F", "pointing"} == set(told["metrics"]) and (told["metrics"]["M_J"]["n"], told["metrics"]["M_F"]["n"]) == (10, 9) and "10 questions" in told["coverage"] and "1 have nothing to find: f1#5" in told["coverage"]
    assert told["baselines"]["everything"]["M_J"]["value"] == pytest.approx(.9*400/1920, abs=.01)


def prompted(folder, column):
    "Three photographs with two classes, and a list that asks for them."
    codes = {300: (10, 44, 7), 515: (20, 3, 9)}
    for n in range(3):
        image(folder / f"frames/val/a{n}.jpg", n); tone(folder / f"audio/p{n}.wav", n)
        paint = np.zeros((40, 48, 3), np.uint8); paint[5:20, 8:30] = codes[300]; paint[25:35, 8:30] = codes[515]
        (folder / "annotations/val").mkdir(parents=True, exist_ok=True)
        Image.fromarray(paint).save(folder / f"annotations/val/a{n}_seg.png")
    rows = [f'val/a{n}.jpg,{code},p{n}.wav,"[0.1, 0.2]"' for n in range(3) for code in codes] + ['val/a0.jpg,7,p0.wav,"[0.1, 0.2]"', 'val/a1.jpg,300,p2.wav,"[3, 4]"']
    (folder / "prompted_segmentation.csv").write_text(f"image_location,ade_class_id,{column},timing\n" + "\n".join(rows))
    return folder


def test_segmentation_end_to_end(tmp_path):
    prompted(tmp_path, "speech_prompt_file")
    codes = (300, 515)
    told = evaluate("ade_speech", dense_model(), tmp_path, tmp_path)
    assert set(told["metrics"]) == {f"{way}/{k}" for way in ("basic", "advanced") for k in ("mAP", "mIoU", *(f"{kind}/{code}" for kind in ("AP", "IoU") for code in codes))}
    assert all(v["n"] == (6 if "/m" in k else 3) and v["lo"] <= v["value"] <= v["hi"] for k, v in told["metrics"].items())
    assert all(set(rule) == set(told["metrics"]) for rule in told["baselines"].values())
    assert set(told["baselines"]) == {"everything", "centre", "saliency", "random", "shuffled"} and len(told["items"]) == 6
    assert "nothing is heard in the span" in told["coverage"] and "1 have nothing to find: val/a0#p0#7; classes left out, in none of their pictures: 7" in told["coverage"]
    shares = [22*15, 22*10]
    assert told["baselines"]["everything"]["basic/mAP"]["value"] == pytest.approx(np.mean(shares)/1600, abs=.02)


SMALL = MLPConfig(hidden=8, layers=(1,), lrs=(1e-2,), inits=("uniform",), points=1, epochs=3)


def test_heads_on_photographs(tmp_path):
    for way, column in (("Speech", "speech_prompt_file"), ("Sound", "vggsound_file")):
        with open(prompted(tmp_path / f"both/ADE20K{way}Prompted", column) / "prompted_segmentation.csv", "a") as f: f.write("\nval/a9.jpg,300,p0.wav,\nval/a0.jpg,x,p0.wav,")
    found = read_listing("ade_heads", tmp_path / "both", tmp_path / "both")
    assert (found.n_listed, found.n_found, len(found.missing), len(found.malformed)) == (20, 16, 2, 2) and {e.fold for e in found.items} == {"speech", "sound"} and found.missing[0][0].startswith("speech/")
    told = evaluate("ade_heads", dense_model(), tmp_path / "both", tmp_path / "both")
    m, b = told["metrics"], told["baselines"]
    assert set(m) == {"AP-dis", "AP/speech", "AP/sound", "speech_head", "sound_head"} and {"together", "shuffled heads", "shuffled", "everything", "centre", "saliency", "random"} == set(b)
    apart = [evaluate(f"ade_{way.lower()}", dense_model(), *[tmp_path / f"both/ADE20K{way}Prompted"]*2) for way in ("Speech", "Sound")]
    assert b["together"]["AP-dis"]["value"] == pytest.approx(np.mean([x["metrics"]["advanced/mAP"]["value"] for x in apart]), abs=2e-4), "heads together are the model, as each set alone asks it"
    for rule in ("everything", "centre", "saliency"): assert b[rule]["AP/speech"]["value"] == pytest.approx(apart[0]["baselines"][rule]["advanced/mAP"]["value"], abs=2e-4)
    some = evaluate("ade_heads", dense_model(), tmp_path / "both", tmp_path / "both", limit=4)
    assert {r["id"].split("/")[0] for r in some["items"]} == {"speech", "sound"} and "only the first 4 questions" in some["coverage"]
    with pytest.raises(ValueError, match="none of 1 questions is of sound"): evaluate("ade_heads", dense_model(), tmp_path / "both", tmp_path / "both", limit=1)
    assert "classes left out, in none of their pictures: speech/7, sound/7" in told["coverage"]
    with pytest.raises(ValueError, match="one head"): evaluate("ade_heads", dense_model(heads=1), tmp_path / "both", tmp_path / "both")


def test_probes_end_to_end(tmp_path):
    rows = [f"{k}-{n}.wav,{k},{'dog' if n % 2 else 'cat'}" for k in range(1, 6) for n in range(4)]
    for row in rows:
        name, k, c = row.split(",")
        tone(tmp_path / "audio" / name, 5*(c == "dog") + int(k)/9, .3)
    (tmp_path / "esc50.csv").write_text("filename,fold,category\n" + "\n".join(rows) + "\n")
    for model in (dense_model(), dual_model()):
        told = evaluate("esc50", model, tmp_path, tmp_path / "audio", config=SMALL)
        assert {k: v["n"] for k, v in told["metrics"].items()} == {f"audio/{p}/top1": 20 for p in ("linear", "knn", "hear")}
        assert set(told["baselines"]) == {"majority", "random"} and len(told["items"]) == 60
    for n in range(6): film(tmp_path / f"films/{'Archery' if n < 3 else 'YoYo'}/v{n}.mp4", n, .5)
    (tmp_path / "classInd.txt").write_text("1 Archery\n2 YoYo\n")
    names = [f"{'Archery' if n < 3 else 'YoYo'}/v{n}.avi" for n in range(6)]
    for split, test in ((1, (0, 5)), (2, (2, 3))):
        (tmp_path / f"testlist0{split}.txt").write_text("".join(f"{names[n]}\n" for n in test))
        (tmp_path / f"trainlist0{split}.txt").write_text("".join(f"{names[n]} {1 + (n > 2)}\n" for n in range(6) if n not in test))
    with pytest.raises(ValueError, match="needed five at least"): evaluate("ucf101", dual_model(), tmp_path, tmp_path / "films", probes=("knn",))
    x = np.eye(2)[[0, 0, 0, 1, 1, 1]]
    for folder in (tmp_path / "own",): save_embeddings(folder, [*names, *(f"Archery/w{n}.avi" for n in range(3))], video=np.concatenate([x, x[:3]]))
    for n in range(3): film(tmp_path / f"films/Archery/w{n}.mp4", n, .2)
    for split in (1, 2):
        with open(tmp_path / f"trainlist0{split}.txt", "a") as f: f.writelines(f"Archery/w{n}.avi 1\n" for n in range(3))
    told = evaluate("ucf101", tmp_path / "own", tmp_path, tmp_path / "films", probes=("knn",))
    assert told["metrics"]["video/knn/top1"]["n"] == 4 and len(told["metrics"]["video/knn/top1"]["splits"]) == 2 and {row["split"] for row in told["items"]} == {1, 2}


@pytest.mark.parametrize("task", ("view_count", "scene"))
def test_lvu_end_to_end(tmp_path, task):
    lists = tmp_path / task
    lists.mkdir()
    for n in range(9): film(tmp_path / f"films/c{n}.mp4", n, .4, 5)
    for part, some in (("train", range(5)), ("val", (5, 6)), ("test", (7, 8, 12))):
        (lists / f"{part}.csv").write_text("a b videoid u\n" + "".join(f"{n*100 + 7 if task == 'view_count' else n % 2} x c{n} u\n" for n in some))
    told = evaluate("lvu", dual_model(), lists, tmp_path / "films", probes=("linear",))
    figure = "MSE" if task == "view_count" else "top1"
    assert {k: v["n"] for k, v in told["metrics"].items()} == {f"{kind}/linear/{figure}": 2 for kind in ("video", "audio")} and "9 of 10 rows" in told["coverage"]
    own = save_embeddings(tmp_path / "own", [f"c{n}" for n in range(9)], video=np.random.default_rng(0).normal(size=(9, 3, 4))) # three windows each, no sound
    assert list(evaluate("lvu", own, lists, tmp_path / "films", probes=("linear",), vote="softmax")["metrics"]) == [f"video/linear/{figure}"]


@pytest.mark.parametrize("kind", ("class", "event"))
def test_hear_end_to_end(tmp_path, kind):
    folder = make_hear_task(tmp_path / "task", kind, files=3, seconds=1.5)
    told = evaluate("hear", dense_model(), folder, folder, config=SMALL)
    assert "9 of 9 rows" in told["coverage"] and len(told["items"]) == 9 and "random" in told["baselines"]
    x = np.random.default_rng(0).normal(size=(9, 4))
    own = save_embeddings(tmp_path / "own", [row["id"] for row in told["items"]], audio=x)
    if kind == "event":
        with pytest.raises(ValueError, match="onsets are asked"): evaluate("hear", own, folder, folder)
    else: assert evaluate("hear", own, folder, folder, config=SMALL)["metrics"]["top1"]["n"] == 9


def test_bring_your_own_is_a_row_of_the_same_table(clips, tmp_path):
    ids = [e.id for e in read_listing("vggsound", clips, clips / "media").items]
    x = np.random.default_rng(0).normal(size=(len(ids), 8))
    told = evaluate("vggsound", save_embeddings(tmp_path / "own", ids, video=x, audio=torch.from_numpy(x)), clips, clips / "media")
    assert told["metrics"]["v2a/R@1"]["value"] == 1 and told["metrics"]["v2a/R@1"]["n"] == 5 # media are not opened: the broken film counts too
    from safetensors.numpy import save_file
    (tmp_path / "own/video.npy").unlink()
    save_file({"video": x.astype(np.float16)}, tmp_path / "own/video.safetensors")
    assert evaluate("vggsound", tmp_path / "own", clips, clips / "media")["metrics"]["v2a/R@1"]["value"] == 1
    np.save(tmp_path / "own/audio.npy", x[:, :5])
    with pytest.raises(ValueError, match="share no space"): evaluate("vggsound", tmp_path / "own", clips, clips / "media")
    (tmp_path / "own/ids.csv").write_text("id,row\nelsewhere,0\n")
    with pytest.raises(ValueError, match="none of 5 clips could be asked.*ids.csv has no"): evaluate("vggsound", tmp_path / "own", clips, clips / "media")
    for text in ("id,row\na,9\n", "id,row\na,0\na,1\n", "id,row\na,-1\n", "name,row\na,0\n"):
        (tmp_path / "own/ids.csv").write_text(text)
        with pytest.raises(ValueError, match="ids.csv:"): embedder(tmp_path / "own")
    np.save(tmp_path / "own/audio.npy", np.array([{}] * 5, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no array of numbers"): embedder(tmp_path / "own")
    with pytest.raises(FileNotFoundError, match="needed ids.csv"): FolderEmbedder(tmp_path)


# Measures against literal re-computations

@pytest.mark.quick
def test_blocks_change_no_score(clips, monkeypatch):
    "All pairs at once, a pair at a time: sounds of different lengths are padded, and padding is not heard."
    from avnb.heads import pair_scores
    e = embedder(dense_model())
    items = [Entry(f"c{n}", picture=(path := clips / f"media/c{n}_00000{n}.mp4"), sound=path, moment=(0., (1., .6, .8, .5)[n])) for n in range(4)]
    found = [[e.common(i, kind) for i in items] for kind in ("audio", "video")]
    how = {k: e.facts[k] for k in ("heads", "pool", "aggregate")}
    literal = torch.stack([torch.cat([pair_scores(a["x"], v["x"], a["keep"], **how)[0][0] for v in found[1]]) for a in found[0]])
    assert torch.allclose(measures.all_scores(e, items), literal, atol=1e-5)
    monkeypatch.setattr(measures, "BUDGET", 1)
    assert torch.allclose(measures.all_scores(e, items), literal, atol=1e-5)


class Painted(Embedder):
    "Maps and vectors that a test hands over."
    def __init__(self, maps):
        super().__init__("painted", "")
        self.maps = maps
    def heat(self, e, how="square"): return {"basic": self.maps[e.id]}


def painted(folder, n, films=None):
    "Maps and masks at the size they are compared in, so that the whole set can be scored at once."
    draw, maps, truth, items = torch.Generator().manual_seed(n), {}, [], []
    for i in range(n):
        image(folder / f"{i}.png", i)
        mask = torch.rand(7, 7, generator=draw).gt(.6).repeat_interleave(32, 0).repeat_interleave(32, 1)
        if i == 3: mask[:] = False
        Image.fromarray(mask.numpy().astype(np.uint8)*255).save(folder / f"m{i}.png")
        maps[str(i)] = torch.randn(SIDE, SIDE, generator=draw)
        truth.append(mask)
        items.append(Entry(str(i), picture=folder / f"{i}.png", mask=folder / f"m{i}.png", label="ab"[i % 2], group=films[i] if films else ""))
    return Painted(maps), items, torch.stack([maps[e.id] for e in items]), torch.stack(truth)


@pytest.mark.quick
@pytest.mark.parametrize("films", (None, "uvwxyz", "aabbcc"))
def test_clip_by_clip_is_the_whole_set_at_once(tmp_path, films):
    "The metrics' own functions on all maps together; frames of one film are drawn together."
    model, items, heat, truth = painted(tmp_path, 6, films)
    told = measures.ask_localisation(model, items, masks=True)
    scaled = (heat - heat.min())/(heat.max() - heat.min())
    iou, F, there = avs_each(scaled, truth)
    assert {k: told["metrics"][k] for k in ("M_J", "M_F")} == avs_told(iou, F, there, films) and told["empty"] == ["3"]
    if films != "aabbcc": assert {k: told["metrics"][k] for k in ("M_J", "M_F")} == avs_figures(scaled, truth)
    assert [row["M_J"] for row in told["items"]] == pytest.approx(iou.tolist())
    told, seen = measures.ask_localisation(model, items), [n for n in range(6) if n != 3]
    if films != "aabbcc": assert told["metrics"] == localisation_figures(heat[seen], truth[seen])
    everywhere = localisation_figures(torch.ones(5, SIDE, SIDE, dtype=torch.bool), truth[seen])
    assert {k: v["value"] for k, v in told["baselines"]["everything"].items()} == {k: v["value"] for k, v in everywhere.items()}
    told = measures.ask_segmentation(model, items)
    assert told["metrics"] == {f"basic/{k}": v for k, v in segmentation_figures(heat, truth, [e.label for e in items]).items()}


@pytest.mark.quick
def test_a_broken_sound_breaks_its_own_clip_only(tmp_path):
    "Maps with another's sound take it from a clip that could be asked."
    for n in range(4): image(tmp_path / f"media/frames/c{n}.jpg", n); tone(tmp_path / f"media/audio/c{n}.wav", n)
    (tmp_path / "media/audio/c1.wav").write_bytes(b"no sound")
    (tmp_path / "vggss.json").write_text(json.dumps([{"file": f"c{n}", "class": f"k{n}", "bbox": BOX} for n in range(4)]))
    told = evaluate("vggss", dense_model(), tmp_path, tmp_path / "media")
    assert [row["id"] for row in told["items"]] == ["c0", "c2", "c3"] and "1 could not be used: c1" in told["coverage"] and told["baselines"]["shuffled"]["cIoU"]["n"] == 3


@pytest.mark.quick
def test_a_protocol_of_ones_own(clips):
    "What is published next needs a reader and no change here."
    p = Protocol(name="next", task="retrieval", what="clips", list_from="somewhere", reader=PROTOCOLS["vggsound"].reader, lists="list", media="clips")
    assert read_listing(p, clips, clips / "media").n_found == 5 and "-p protocol next " in p.command
