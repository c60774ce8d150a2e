// Set-uid root: says as whom it runs, which tells whether no_new_privs was set.
#include <stdio.h>
#include <unistd.h>

int main(void) {
  printf("Effective uid: %d\n", geteuid());
  return 0;
}
