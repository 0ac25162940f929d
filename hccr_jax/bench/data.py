"""A synthetic data set for the benchmark, made by the library through real archives."""

import functools
import subprocess
import sys
import zipfile
from pathlib import Path

from hccr_jax.data.casia import charset, gnt
from hccr_jax.data.splits import Split, load_split
from hccr_jax.data.synthetic import archives

NAME = "benchmark"


class SyntheticData:
    """A data set of simulated writers; everything is made when it is first needed."""

    def __init__(self, folder: Path, num_classes: int, num_images: int) -> None:
        """Sets the size of the data set.

        Args:
          folder: for everything.
          num_classes: characters, each once a writer; at most all of level 1.
          num_images: of all splits together, rounded up to whole writers, at least four.
        """
        self.folder = folder
        self.num_classes = num_classes
        self.num_writers = max(4, -(-num_images // num_classes))
        self.num_images = self.num_writers * num_classes

    @functools.cached_property
    def archives(self) -> Path:
        """The folder of a training and a test archive, the last writer's."""
        folder = self.folder / "archives"
        folder.mkdir()
        writers = range(self.num_writers)
        for name, members in (("trn", writers[:-1]), ("tst", writers[-1:])):
            content = self._member(seed=members[0])  # of each split its own: none is in two
            with zipfile.ZipFile(folder / f"{NAME}_{name}_gnt.zip", "w") as archive:
                for writer in members:
                    archive.writestr(f"{writer}-c.gnt", content, zipfile.ZIP_DEFLATED, 1)
        return folder

    def _member(self, seed: int) -> bytes:
        """Returns the content of a GNT file of all characters."""
        # They share a few drawings: only sizes and the amount of ink matter here.
        drawn = archives.write_member("".join(charset.level1()[:64]), 1, seed=seed)
        bitmaps = [record.bitmap for record in gnt.read_records(drawn, "drawn")]
        return b"".join(
            gnt.pack_record(charset.character_to_tag(character), bitmaps[i % len(bitmaps)])
            for i, character in enumerate(charset.level1()[: self.num_classes])
        )

    def prepare(self) -> None:
        """Makes the data set with the user's command, start-up included."""
        command = [
            *(sys.executable, "-m", "hccr_jax", "prepare", "--overwrite", f"--name={NAME}"),
            *(f"--archives={self.archives}", f"--data_dir={self.folder}"),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @functools.cached_property
    def prepared(self) -> Path:
        """The folder of data sets, this one prepared."""
        self.prepare()
        return self.folder

    def load(self, image_px: int, margin_px: int) -> Split:
        """Returns the training split in normal form."""
        return load_split(NAME, self.prepared, "train", image_px, margin_px)
