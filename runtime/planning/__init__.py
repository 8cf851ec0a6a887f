"""What a run of a DeepSeek-V3 will take: parameters, layout, memory line by line, FLOPs and seconds."""
