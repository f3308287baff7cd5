"""Q-VLM (Wang et al. 2024, arXiv 2410.08119) as a baseline: entropy partition, joint search of clipping ranges."""
