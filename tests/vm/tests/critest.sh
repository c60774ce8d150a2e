# critest, the conformance suite. Its images have the names of registries; PullImage answers with builds of this node.

specs() { # specs NAME PASSING FOCUS SKIP: exactly so many pass, and none fails
  local line log=/tmp/critest-$1.log
  critest -config /etc/crictl.yaml -ginkgo.no-color -ginkgo.v -ginkgo.focus "$3" -ginkgo.skip "$4" > $log 2>&1 &
  while kill -0 $! 2> /dev/null; do sleep 15; say "critest $1: $(grep -c '^• ' $log) done"; done
  say "critest $1: the longest: $(grep -oE '^• \[[0-9.]+ seconds' $log | grep -oE '[0-9.]+' | sort -rn | head -5 | xargs) s"
  line=$(grep -E '(Passed|Failed) \|' $log | tail -1)
  say "critest $1: $line"
  grep -q "$2 Passed | 0 Failed" <<< "$line" || { grep -A12 '\[FAILED\]' $log | head -60; tail -20 $log; exit 1; }
}

critest_images() {
  local in=/suite/images
  slipway tag $IMAGE registry.k8s.io/e2e-test-images/busybox:1.29-2
  slipway build -q -t registry.k8s.io/e2e-test-images/nginx:1.14-2 --target nginx $in
  slipway build -q -t registry.k8s.io/e2e-test-images/httpd:2.4.39-4 --target httpd $in
  slipway build -q -t registry.k8s.io/e2e-test-images/nonewprivs:1.3 --target nonewprivs $in
  slipway build -q -t gcr.io/k8s-staging-cri-tools/test-image-predefined-group:latest --target predefined-group $in
  slipway build -q -t gcr.io/k8s-staging-cri-tools/hostnet-nginx-amd64:latest --build-arg PORT=12003 --target nginx $in
}

critest_specs() { # side by side: most of their time they wait
  local others='benchmark|AppArmor|Image|Streaming' pids=() failed=
  specs apparmor 9 AppArmor benchmark & pids+=($!)
  specs contexts 39 'Security Context' "$others" & pids+=($!)
  # Containers, pods, mounts, limits.
  specs runtime 44 'Runtime info|Container|PodSandbox|Multiple|Idempotence' "$others|Security Context" & pids+=($!)
  for pid in "${pids[@]}"; do wait "$pid" || failed=yes; done
  [ -z "$failed" ]
}
