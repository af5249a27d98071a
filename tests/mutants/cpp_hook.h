// Enables one fault in a build of schemata: included before every file of csrc, defined in cpp_hook.cpp.

#pragma once

extern "C" {
extern int las_mutant;               // number of the enabled fault; -1: none
extern unsigned char las_reached[];  // whether each fault has been reached
}

__attribute__((always_inline)) inline bool las_mutant_is_on(int number) {
  las_reached[number] = 1;
  return las_mutant == number;
}

#define LAS_MUTANT(number) las_mutant_is_on(number)
