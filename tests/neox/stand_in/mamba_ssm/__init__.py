"""Stands for mamba_ssm on a CPU: the scan that GPT-NeoX takes of it where it fuses nothing."""
