"""The network itself: loading, text encoding, LoRA, ControlNet, tiling, decoder refinement."""
