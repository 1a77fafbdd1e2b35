"""Which files a model is and whether it fits, seen without torch: folders, hub repositories, single files, LoRAs."""
