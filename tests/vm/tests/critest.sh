# critest, the conformance suite. Its images have the names of registries; PullImage answers with builds of this node.

specs() { # specs NAME PASSING FOCUS SKIP: exactly so many pass, and none fails
  local line
  critest -config /etc/crictl.yaml -ginkgo.no-color -ginkgo.v -ginkgo.focus "$3" -ginkgo.skip "$4" > /tmp/critest.log 2>&1 &
  while kill -0 $! 2> /dev/null; do sleep 15; say "critest $1: $(grep -c '^• ' /tmp/critest.log) done"; done
  say "critest $1: the longest: $(grep -oE '^• \[[0-9.]+ seconds' /tmp/critest.log | grep -oE '[0-9.]+' | sort -rn | head -5 | xargs) s"
  line=$(grep -E '(Passed|Failed) \|' /tmp/critest.log | tail -1)
  say "critest $1: $line"
  grep -q "$2 Passed | 0 Failed" <<< "$line" || { grep -A12 '\[FAILED\]' /tmp/critest.log | head -60; tail -20 /tmp/critest.log; exit 1; }
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

critest_apparmor() { specs AppArmor 9 AppArmor benchmark; }

critest_runtime() { # containers, pods, mounts, limits and security contexts
  specs runtime 83 'Runtime info|Container|PodSandbox|Multiple|Security Context|Idempotence' 'benchmark|AppArmor|Image|Streaming'
}
