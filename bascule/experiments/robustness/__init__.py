"""Success in scenes unlike those of training: cells that are kept, one policy's report, several arms compared."""
