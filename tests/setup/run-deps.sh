#!/usr/bin/env bash
# What `make run` needs beside the build: the standard CNI plugins, a packet filter for them, and the means to make a
# base image from Debian's packages.
. "$(dirname "$0")/lib.sh"
apt_install containernetworking-plugins iptables iproute2 mmdebstrap
