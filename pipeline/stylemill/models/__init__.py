"""Which files a model is and whether it fits, seen without torch: folders, hub repositories, single files, LoRAs."""

EMBEDDED = "demo"  # the name of the model that comes with the package; a folder of this name is ./demo
