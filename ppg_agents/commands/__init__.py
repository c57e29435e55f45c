"""The commands of ``ppg-agent``, one file each."""
